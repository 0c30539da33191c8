"""The main job as the README promises it, through torchrun on four ranks; one epoch of it, to be quick."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import assert_not_blank

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
CHANNELS = ("u500", "v500", "z500")


@pytest.mark.timeout(1200)
def test_the_quickstart_beats_persistence_at_a_day(tmp_path) -> None:
    shorter = [f"run={tmp_path / 'run'}", "trainer.epochs=1", "forecast.every=16", "forecast.lead=24h"]
    changes = [part for change in shorter for part in ("--set", change)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def credit(*words: str, ranks: int) -> str:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "credit", *words, str(CONFIG), *changes]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = credit("train", ranks=4)
    assert "mesh dp 2 x tp 1 x domain 2 (ddp) on cpu, ranks from torchrun" in said
    assert re.search(r"step 59/59 .* samples/s  ETA 0:00", said)
    credit("forecast", ranks=2)
    table = credit("score", ranks=1)

    with (tmp_path / "run" / "scores.csv").open() as stream:
        rmse = {
            (row["channel"], row["lead_hours"], row["forecast"]): float(row["rmse"]) for row in csv.DictReader(stream)
        }
    for channel in CHANNELS:
        assert rmse[channel, "24", "model"] < 0.9 * rmse[channel, "24", "persistence"]
        assert f"{rmse[channel, '24', 'model']:.4g}" in table
    for picture in ("map.png", "scores.png"):
        assert_not_blank(tmp_path / "run" / picture)
