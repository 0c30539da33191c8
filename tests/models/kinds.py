"""The shipped models, small: what tests of several folders try."""

from __future__ import annotations

from typing import Any

from torch import nn

from credit.models.pangu import Pangu
from credit.models.unet_diffusion import DiffusionUNet
from credit.models.wxformer import WXFormer
from tests.parallel.curves import CHANNELS, HEIGHT, WIDTH

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"width": 4, "levels": 1, "groups": 2},
    "unet_diffusion": {"width": 8, "levels": 2, "groups": 4, "heads": 2},
    "transformer": {"width": 16, "depth": 2, "heads": 4, "window": 2, "ratio": 2},
    "wxformer": {
        **{"widths": [8, 16], "depths": [1, 1], "kernels": [[4, 8], [2, 4]], "strides": [2, 2], "local_window": 3},
        **{"global_windows": [2, 3], "head_width": 4, "ratio": 2, "groups": 2, "spectral_norm": True},
    },
    "pangu": {
        **{"upper": 1, "levels": 2, "width": 8, "depth": 1, "coarse_depth": 1, "heads": 2},
        **{"window": [2, 3, 2], "patch": [2, 2, 2]},
    },
}
"""Blocks of a config, by name."""

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
