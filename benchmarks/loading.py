"""The share of a training run's time that is spent waiting for data, by the number of workers that read it.

    python benchmarks/loading.py --workers 0 1 2

Fields of 1 degree, 12 channels, in a compressed zarr store of one time a chunk, as such stores come; a small U-Net. One
process; the first batches, for which workers start, are told apart.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.launch.job import start_job
from credit.training.train import train

STATES, GRID, LEVELS, FIRST = 96, (181, 360), tuple(range(100, 1001, 100)), 4


def waves() -> xr.Dataset:
    """Fields `a`, `b` and, on LEVELS, `c`, 6-hourly: waves that move east."""
    latitude, longitude = np.linspace(90, -90, GRID[0]), np.arange(GRID[1]) * 360 / GRID[1]
    phase = np.deg2rad(longitude)[None, None, :] - 0.3 * np.arange(STATES)[:, None, None]
    envelope = np.cos(np.deg2rad(latitude))[None, :, None]
    a = (10 + envelope * np.sin(2 * phase)).astype(np.float32)
    b = (270 + 20 * envelope + envelope * np.cos(3 * phase)).astype(np.float32)
    factor = np.arange(1, len(LEVELS) + 1, dtype=np.float32)[:, None, None]
    dims = ("time", "latitude", "longitude")
    fields = {"a": (dims, a), "b": (dims, b), "c": (("time", "level", *dims[1:]), a[:, None] * factor)}
    time = np.datetime64("2020-01-01", "ns") + np.arange(STATES) * np.timedelta64(6, "h")
    return xr.Dataset(
        fields, {"time": time, "latitude": latitude, "longitude": longitude, "level": [float(p) for p in LEVELS]}
    )


def write_store(path: Path) -> None:
    data = waves()
    encoding = {"c": {"chunks": (1, len(LEVELS), *GRID)}, "a": {"chunks": (1, *GRID)}, "b": {"chunks": (1, *GRID)}}
    data.to_zarr(path, mode="w", consolidated=False, encoding=encoding)


def conf(folder: Path, workers: int, width: int, batch: int) -> dict[str, Any]:
    day = "2020-01-{:02d}".format
    return {
        "run": str(folder / f"workers{workers}"),
        "data": {
            "path": str(folder / "store.zarr"),
            "variables": ["a", "b", "c"],
            "levels": list(LEVELS),
            "forcings": ["cos_zenith"],
            "step": "6h",
            "train": [day(1), day(21)],
            "valid": [day(21), day(22)],
            "test": [day(22), day(23)],
            "stats": str(folder / "stats.nc"),
            "workers": workers,
        },
        "model": {"name": "unet", "width": width, "levels": 2},
        "trainer": {"epochs": 1, "batch_size": batch},
        "forecast": {"lead": "6h"},
    }


def waited(raw: dict[str, Any]) -> tuple[float, float, float]:
    """(seconds for the first batches, seconds of a step after them, share of these spent waiting)."""
    with start_job(lambda: parse_config(raw)) as job:
        train(job)
    with (Path(raw["run"]) / "log.csv").open() as stream:
        rows = [(float(row["waited"]), float(row["seconds"])) for row in csv.DictReader(stream)]
    waits, steps = (sum(part) for part in zip(*rows[FIRST:], strict=True))
    return sum(wait for wait, _ in rows[:FIRST]), (waits + steps) / len(rows[FIRST:]), waits / (waits + steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store.zarr")
        write_statistics(parse_config(conf(Path(folder), 0, given.width, given.batch)))
        print("workers  first batches, s  step, s  waiting")
        for workers in given.workers:
            first, step, share = waited(conf(Path(folder), workers, given.width, given.batch))
            print(f"{workers:7d}  {first:16.2f}  {step:7.3f}  {share:7.0%}")


if __name__ == "__main__":
    main()
