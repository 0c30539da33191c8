"""A rank killed at any moment of a run that checkpoints at every step: it resumes, and ends with the same bits."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.parallel.checkpoint import list_checkpoints
from tests.ranks import World
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import losses_and_weights, on

STEPS = 30


def killed_somewhere(raw: dict, moments: random.Random) -> bool:
    """Start the run, and kill one of its ranks soon after its next checkpoint; False if it got to its end before."""
    world = World(2)
    directory = Path(raw["run"]) / "checkpoints"
    before = list_checkpoints(directory)[-1:]
    victim = moments.randrange(2)
    try:
        world.begin(losses_and_weights, raw)
        while list_checkpoints(directory)[-1:] == before:
            assert world.alive, "a rank died by itself"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.25))
        finished = world.answers(victim, 0)
        world.kill(victim)
        # The other notices, and stops by itself.
        assert world.answers(1 - victim, 60)
    finally:
        world.close()
    return not finished


@pytest.mark.parametrize("number", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_kills(tmp_path, number: int) -> None:
    raw = conf(tmp_path / "whole", write_zarr(tmp_path / "s.zarr", dataset()), dtype="float32")
    raw["data"]["stats"] = str(tmp_path / "stats.nc")
    raw["trainer"].update(checkpoint_every=1, epochs=STEPS // 5, timeout=30, ema=0.9)
    write_statistics(parse_config(raw))
    world = World(2)
    try:
        (losses, weights), _ = world.run(losses_and_weights, on(raw, tmp_path / "whole", "fsdp2", 2))
    finally:
        world.close()
    assert len(losses) == STEPS
    moments, kills, runs = random.Random(0), 0, 0
    while kills < number:
        runs += 1
        directory = tmp_path / f"cut{runs}" / "checkpoints"
        cut = on(raw, directory.parent, "fsdp2", 2)
        while kills < number and not (directory / f"step-{STEPS:08d}").exists():
            kills += killed_somewhere(cut, moments)
        world = World(2)
        try:
            (rest, ended), _ = world.run(losses_and_weights, cut)
        finally:
            world.close()
        assert rest == losses[len(losses) - len(rest) :]
        assert ended.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_array_equal(ended[name], value, err_msg=name)
