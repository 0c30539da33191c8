"""The shipped models on every mesh and in every mode == one process: a few steps, losses, norms, parameters, averages.

The whole matrix takes half an hour of two cores: `make test-all`. `make test` runs one mesh of all three axes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor

from tests.models import parity
from tests.models.kinds import pangu, unet_diffusion, wxformer
from tests.parallel.curves import MODES, SHAPES


@cache
def serial(build: Any) -> dict[str, Tensor]:
    return parity.curve(build, "none", 1, 1)


CASES = [
    pytest.param(shape, mode, marks=() if (shape, mode) == ((2, 2, 2), "fsdp2 over dp x domain") else pytest.mark.slow)
    for shape in SHAPES
    for mode in MODES
    if mode != "none" or shape[0] == 1  # data: none with replicas is refused, whatever the model: see test_one_curve
]


@pytest.mark.parametrize("build", [wxformer, unet_diffusion, pangu])
@pytest.mark.parametrize(
    ("shape", "mode"), CASES, ids=lambda case: case if isinstance(case, str) else "x".join(map(str, case))
)
def test_every_mesh_gives_the_curve_of_one_process(worlds, build: Any, shape: tuple[int, int, int], mode: str) -> None:
    dp, tp, domain = shape
    for wrong in worlds(dp * tp * domain).run(parity.curve_errors, build, mode, tp, domain, serial(build)):
        assert not wrong
