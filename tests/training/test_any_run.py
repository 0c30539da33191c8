"""Resumed == uninterrupted, and any mesh == one process, for runs that are drawn at random.

python -m tests.training.test_any_run 200        # so many, from other seeds than the tests'
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from credit.config import parse_config
from credit.data.prepare import write_statistics
from tests.ranks import World
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import interrupted, losses_and_weights, on

MODELS: list[dict[str, Any]] = [
    {"name": "unet", "width": 4, "levels": 1, "groups": 2},
    {"name": "transformer", "width": 16, "depth": 2, "heads": 4, "window": 2, "ratio": 2},
    {"name": "tests.training.odd_models.Odd"},
]
MESHES = [
    ("none", 1, 1, 1),
    ("none", 1, 1, 2),
    ("none", 1, 1, 3),
    ("ddp", 2, 1, 1),
    ("fsdp2", 2, 1, 1),
    ("fsdp2", 1, 1, 2),
]
CUT_CHANNELS = [("none", 1, 2, 1), ("ddp", 2, 2, 1), ("fsdp2", 1, 2, 2)]
"""(data, dp, tensor, domain)."""


def drawn(seed: int, folder: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, int]], int]:
    """(a config, the meshes before and after, the step at which it dies)."""
    pick = random.Random(seed)
    raw = conf(folder / "one", write_zarr(folder / "s.zarr", dataset()), dtype="float64", checkpoint_every=3)
    raw["data"] |= {"stats": str(folder / "stats.nc"), "history": pick.choice([1, 1, 2, 3])}
    if pick.random() < 0.3:
        raw["data"] |= {"variables": ["a"], "diagnostics": ["b"]}
    if pick.random() < 0.3:
        raw["constraints"] = [
            {"name": "nonnegative", "variables": ["a"]},
            {"name": "conserve", "terms": {"a": 1.0}, "adjust": "a", "by": pick.choice(["scale", "shift"])},
        ]
    raw["model"] = pick.choice(MODELS)
    rollout = pick.choice([1, 1, 2])
    loss: dict[str, Any] = {"kind": pick.choice(["mse", "mae", "huber", "crps"]), "members": 2}
    loss["spectral"] = pick.choice([0.0, 0.0, 0.5])
    raw["trainer"] |= {
        "loss": loss,
        "rollout": rollout,
        "rollout_detach": rollout > 1 and pick.random() < 0.5,
        "ema": pick.choice([None, 0.9]),
        "accumulate": pick.choice([1, 1, 2]),
        "clip": pick.choice([None, 0.3]),
        "schedule": pick.choice(["cosine", "linear", "constant"]),
        "warmup_steps": pick.choice([0, 3]),
        "checkpoint_async": pick.random() < 0.3,
        "activation_checkpointing": pick.random() < 0.2,
        "keep": pick.choice([1, 2]),
    }
    if pick.random() < 0.4:
        raw["trainer"]["freeze"] = ["*bias"]
    meshes = MESHES + (CUT_CHANNELS if raw["model"]["name"] == "transformer" else [])
    write_statistics(parse_config(raw))
    return raw, [pick.choice(meshes), pick.choice(meshes)], pick.randrange(1, 10)


def check(seed: int, folder: Path, worlds: Callable[[int], World]) -> str:
    """Compare one run; what it was."""
    raw, meshes, step = drawn(seed, folder)
    losses, weights = losses_and_weights(on(raw, folder / "one", "none", 1))
    words = f"seed {seed}: {raw['model']['name']}, {meshes[0]} until {step}, then {meshes[1]}: {raw}"
    found: list[tuple] = []
    for (data, dp, tensor, domain), run in zip(meshes, (interrupted, losses_and_weights), strict=True):
        ranks, cut = dp * tensor * domain, on(raw, folder / "cut", data, domain, tensor)
        arguments = (cut, step) if run is interrupted else (cut,)
        found = worlds(ranks).run(run, *arguments) if ranks > 1 else [run(*arguments)]
    for rest, values in found:
        np.testing.assert_allclose(rest, losses[len(losses) - len(rest) :], rtol=1e-8, err_msg=words)
        assert values.keys() == weights.keys(), words
        for name, value in weights.items():
            scale = 1e-8 * max(abs(value).max(), 1e-3)
            np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=scale, err_msg=f"{name}, {words}")
    return words


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))])
def test_a_run_is_the_uninterrupted_run_of_one_process(worlds, tmp_path, seed) -> None:
    check(seed, tmp_path, worlds)


def main() -> None:
    number, begun = int(sys.argv[1]), {}

    def worlds(size: int) -> World:
        if size not in begun:
            begun[size] = World(size)
        return begun[size]

    wrong = 0
    for seed in range(1000, 1000 + number):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print("same ", check(seed, Path(folder), worlds)[:160], flush=True)
            except Exception as error:
                wrong += 1
                print("WRONG", f"seed {seed}", error, flush=True)
                for world in begun.values():
                    world.close()
                begun.clear()
    print(f"{number - wrong} of {number} runs are the uninterrupted ones")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
