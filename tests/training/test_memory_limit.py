"""A model that a limit of memory keeps from training is trained on slices, with the same losses."""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from credit.config import parse_config
from credit.data.prepare import write_statistics
from tests.stores import conf, dataset, write_zarr


def train(config: Path, run: Path, limit: int, *options: str) -> tuple[subprocess.CompletedProcess, int]:
    """One process, whose data may take so many bytes; and the most that they took."""
    words = ["-m", "credit", "train", str(config), "--set", f"run={run}", *options]
    # A C library that keeps what is freed would count as the model.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    running = subprocess.Popen(
        [sys.executable, *words],
        **{"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    peak = 0
    while running.poll() is None:
        lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))])
        time.sleep(0.005)
    out, err = running.communicate()
    return subprocess.CompletedProcess(words, running.returncode, out, err), peak


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_of_what_a_step_takes_plain_is_enough_on_slices(tmp_path) -> None:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset(8, (361, 720))), epochs=1)
    raw["data"] |= {"stats": str(tmp_path / "stats.nc"), "train": ["2020-01-01", "2020-01-02"]}
    raw["data"] |= {"valid": ["2020-01-02", "2020-01-02 12:00"], "test": ["2020-01-02 12:00", "2020-01-03"]}
    raw["model"], raw["trainer"]["batch_size"] = {"name": "unet", "width": 32}, 1
    write_statistics(parse_config(raw))
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw))

    done, plain = train(config, tmp_path / "plain", resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    done, _ = train(config, tmp_path / "refused", plain // 2)
    assert done.returncode == 2
    assert "the memory does not suffice" in done.stderr
    done, sliced = train(config, tmp_path / "sliced", plain // 2, "--slices", "auto")
    assert done.returncode == 0, done.stderr
    assert "slices: " in done.stdout + done.stderr
    assert sliced <= plain // 2
    assert losses(tmp_path / "sliced") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
