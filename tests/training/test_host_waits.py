"""A training step of every shipped model reads two numbers from the device, together, and sends it nothing but a batch.

On a GPU all else would be a wait in a step, or a copy from memory that is not pinned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from credit.config import parse_config
from credit.config.models import MODELS
from credit.data.prepare import write_statistics
from credit.launch.job import start_job
from credit.training import train as training
from tests.models.kinds import SMALL
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import on
from tests.waits import Waits

ON_HOST = {
    "training/batches.py:agree": "what ranks say of the next batch, between hosts",
    "training/train.py:_members_of": "the numbers of the samples, of the batch as it was read",
    "domain_parallel/lengths.py:gather_numbers": "what domain ranks say of their shapes, between hosts",
    "domain_parallel/generators.py:torch_generator_state": "the CPU's generator",
    "torch/optim": "the number of the step; on the device where the optimiser is fused",
}
assert SMALL.keys() == MODELS.keys()
MESHES = [("none", 1, 1, 1), ("none", 1, 1, 2), ("ddp", 2, 1, 1), ("fsdp2", 1, 1, 2), ("none", 1, 2, 1)]
"""(data, dp, tensor, domain)."""
CASES = [
    pytest.param(name, mesh, marks=() if m == n else pytest.mark.slow)
    for n, name in enumerate(SMALL)
    for m, mesh in enumerate(MESHES)
    if mesh[2] == 1 or not name.startswith("unet")
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("waits")
    made = conf(folder / "run", write_zarr(folder / "s.zarr", dataset(levels=(1000, 500))), epochs=1)
    made["data"] |= {"variables": ["c", "a"], "levels": [1000, 500], "stats": str(folder / "stats.nc")}
    write_statistics(parse_config(made))
    return made


def waits(raw: dict[str, Any], warm: int = 2) -> dict[str, int]:
    """By place, in the step after `warm` ones, in which constants are made."""
    real, found = training.TrainingRun.train_step, {}

    def counted(self: Any, batch: Any, step: int) -> Any:
        with Waits(ON_HOST) as waits:
            made = real(self, batch, step)
        if step == warm:
            found.update(waits.found)
        return made

    training.TrainingRun.train_step = counted  # type: ignore[method-assign]
    try:
        with start_job(lambda: parse_config(raw)) as job:
            training.train(job)
    finally:
        training.TrainingRun.train_step = real  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_one_read_a_step(worlds, raw, tmp_path, name: str, mesh: tuple[str, int, int, int]) -> None:
    data, dp, tensor, domain = mesh
    given = on({**raw, "model": {"name": name, **SMALL[name]}}, tmp_path / "run", data, domain, tensor)
    for found in worlds(dp * tensor * domain).run(waits, given):
        assert found == {"training/train.py:train_step": 1}


def test_what_would_wait_is_counted() -> None:
    x = torch.ones(3)
    with Waits() as waits:
        x + 1
        assert not waits.found
        x.tolist()
        float(x.sum())
        x[x > 0]
        torch.tensor([1.0, 2.0])
    assert waits.found.total() == 4
