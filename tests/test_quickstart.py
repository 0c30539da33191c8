"""The main job as the README promises it, through torchrun on four ranks; quick: one epoch of half its samples."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from credit.cli import main
from tests.pictures import assert_not_blank

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
CHANNELS = ("u500", "v500", "z500")


@pytest.mark.timeout(1200)
def test_the_quickstart_beats_persistence_at_a_day(worlds, tmp_path, capsys) -> None:
    """Training through torchrun; forecast and score, which it starts alike, on ranks that are there already."""
    shorter = [f"run={tmp_path / 'run'}", "trainer.epochs=1", "trainer.batch_size=4"]
    shorter += ["data.train=[2011-01-15, 2011-03-16]", "forecast.every=16", "forecast.lead=24h"]
    given = [str(CONFIG), *(part for change in shorter for part in ("--set", change))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "credit", "train", *given], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert "mesh dp 2 x tp 1 x domain 2 (ddp) on cpu, ranks from torchrun" in done.stdout
    assert re.search(r"step 59/59 .* samples/s  ETA 0:00", done.stdout)
    assert worlds(2).run(main, ["forecast", *given]) == [0, 0]
    capsys.readouterr()
    assert main(["score", *given]) == 0
    table = capsys.readouterr().out

    with (tmp_path / "run" / "scores.csv").open() as stream:
        rmse = {
            (row["channel"], row["lead_hours"], row["forecast"]): float(row["rmse"]) for row in csv.DictReader(stream)
        }
    for channel in CHANNELS:
        assert rmse[channel, "24", "model"] < 0.9 * rmse[channel, "24", "persistence"]
        assert f"{rmse[channel, '24', 'model']:.4g}" in table
    for picture in ("map.png", "scores.png"):
        assert_not_blank(tmp_path / "run" / picture)
