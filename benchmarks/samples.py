"""Samples a second of reading fields of 0.25 degrees, 70 channels, by the number of workers: this version and another.

    git worktree add /tmp/other 2fb9041
    python benchmarks/samples.py --other /tmp/other --workers 0 1 2

Batches of one sample (two states) from a compressed zarr store in chunks of latitudes. Versions and workers take turns
in processes of their own, three rounds; the first batch, for which workers start, is not counted. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

STATES, GRID, LEVELS = 8, (721, 1440), tuple(float(level) for level in range(1, 70))
HERE = Path(__file__).resolve().parents[1]


def write_store(path: Path) -> None:
    latitude, longitude = np.linspace(90, -90, GRID[0]), np.arange(GRID[1]) * 360 / GRID[1]
    time_axis = np.datetime64("2020-01-01", "ns") + np.arange(STATES) * np.timedelta64(6, "h")
    phase = np.deg2rad(longitude)[None, None, :] - 0.3 * np.arange(STATES)[:, None, None]
    a = (10 + np.cos(np.deg2rad(latitude))[None, :, None] * np.sin(2 * phase)).astype(np.float32)
    factor = np.array(LEVELS, np.float32)[:, None, None]
    axes = {"latitude": latitude, "longitude": longitude, "level": list(LEVELS)}
    dims = ("time", "latitude", "longitude")
    for number in range(STATES):
        fields = {"a": (dims, a[[number]]), "c": (("time", "level", *dims[1:]), a[[number], None] * factor)}
        state = xr.Dataset(fields, {"time": time_axis[[number]], **axes})
        hours = {"time": {"units": "hours since 2020-01-01", "dtype": "int64"}}
        chunks = {"a": {"chunks": (1, 91, GRID[1])}, "c": {"chunks": (1, len(LEVELS), 91, GRID[1])}}
        how: dict[str, Any] = {"append_dim": "time"} if number else {"encoding": {**chunks, **hours}}
        state.to_zarr(path, mode="a", consolidated=False, **how)


def conf(folder: Path, name: str, workers: int) -> dict[str, Any]:
    return {
        "run": str(folder / f"{name}-{workers}"),
        "data": {
            "path": str(folder / "store.zarr"),
            **{"variables": ["a", "c"], "levels": list(LEVELS), "forcings": ["cos_zenith"], "step": "6h"},
            "train": ["2020-01-01", "2020-01-02T12:00"],
            "valid": ["2020-01-02T12:00", "2020-01-03"],
            "test": ["2020-01-03", "2020-01-04"],
            "stats": str(folder / f"stats-{name}.nc"),
            "workers": workers,
        },
        "model": {"name": "unet", "width": 2, "groups": 1, "levels": 1},
        "trainer": {"epochs": 1, "batch_size": 1},
        "forecast": {"lead": "6h"},
    }


def child(folder: Path, name: str, workers: int) -> None:
    """Print seconds a sample, with whatever version is on the path."""
    from credit.config import parse_config
    from credit.data.prepare import write_statistics
    from credit.launch.job import start_job
    from credit.training.train import TrainingRun

    raw = conf(folder, name, workers)
    if not Path(raw["data"]["stats"]).exists():
        write_statistics(parse_config(raw))
    with start_job(lambda: parse_config(raw)) as job:
        run = TrainingRun(job)
        begin, read = 0.0, 0
        for number, _ in enumerate(run.loaders["train"]):
            if number == 0:
                begin = time.monotonic()
            read = number
        print("seconds", (time.monotonic() - begin) / read, flush=True)


def measure(checkout: Path, folder: Path, name: str, workers: int) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder), name, str(workers)]
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    found = [line for line in done.stdout.splitlines() if line.startswith("seconds")]
    if not found:
        raise SystemExit(done.stderr[-2000:])
    return float(found[-1].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout of another version")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, name, workers = given.child
        child(Path(folder), name, int(workers))
        return
    versions = {"this": HERE, **({"other": given.other.resolve()} if given.other else {})}
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store.zarr")
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(given.rounds):
            for workers in given.workers:
                for name, checkout in versions.items():
                    seconds.setdefault((name, workers), []).append(measure(checkout, Path(folder), name, workers))
        print("workers  version  samples/s  of this with 0 workers")
        base = statistics.median(seconds["this", given.workers[0]])
        for (name, workers), each in sorted(seconds.items(), key=lambda one: one[0][1]):
            middle = statistics.median(each)
            print(f"{workers:7d}  {name:7s}  {1 / middle:9.3f}  {base / middle:7.2f}", flush=True)


if __name__ == "__main__":
    main()
