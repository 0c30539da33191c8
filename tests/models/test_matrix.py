"""The shipped models on every mesh and in every mode == one process: a few steps, losses, norms, parameters, averages.

The whole matrix takes half an hour of two cores: `make test-all`. `make test` runs one mesh of all three axes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

from credit.models.pangu import Pangu
from credit.models.unet_diffusion import DiffusionUNet
from credit.models.wxformer import WXFormer
from tests.models import parity
from tests.parallel.curves import CHANNELS, HEIGHT, MODES, SHAPES, WIDTH

FIELDS: tuple[Any, ...] = (CHANNELS, CHANNELS, (HEIGHT, WIDTH))
BLOCKS = {"kernels": ((4, 8), (2, 4)), "strides": (2, 2), "local_window": 2, "global_windows": (2, 2), "head_width": 2}


def filled(model: nn.Module) -> nn.Module:
    """With weights that are nowhere zero, so that every gradient counts."""
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model


def wxformer() -> nn.Module:
    return filled(WXFormer(*FIELDS, widths=(16, 32), depths=(1, 1), ratio=2, groups=2, spectral_norm=True, **BLOCKS))


def unet_diffusion() -> nn.Module:
    return filled(DiffusionUNet(*FIELDS, 16, 1, 1, 8, 8))


def pangu() -> nn.Module:
    return filled(Pangu(*FIELDS, 1, 2, 16, 2, 2, 8, (2, 3, 2), (1, 2, 2)))


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
