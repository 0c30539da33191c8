"""The shipped models as they are recorded in tests: builder, and shape of what it is given, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from credit.models.pangu import Pangu
from credit.models.unet import UNet
from credit.models.unet_diffusion import DiffusionUNet
from credit.models.wxformer import WXFormer


def unet() -> nn.Module:
    return UNet(4, 4, (16, 16), width=4, levels=1, groups=2)


def diffusion() -> nn.Module:
    return DiffusionUNet(4, 4, (16, 16), width=8, levels=1, blocks=1, heads=2)


def wxformer() -> nn.Module:
    widths = {"widths": (8, 16), "depths": (1, 1), "kernels": ((4, 8), (2, 4)), "strides": (2, 2)}
    windows = {"local_window": 2, "global_windows": (4, 2), "head_width": 4, "padding": 4}
    return WXFormer(4, 4, (24, 24), **widths, **windows, spectral_norm=True)


def pangu() -> nn.Module:
    shape = {"width": 4, "depth": 1, "coarse_depth": 1, "heads": 2, "window": (2, 3, 6), "patch": (2, 4, 4)}
    return Pangu(4 * 2 + 2, 4 * 2 + 2, (48, 48), upper=4, levels=2, **shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (unet, (1, 4, 16, 16)),
    "diffusion": (diffusion, (1, 4, 16, 16)),
    "wxformer": (wxformer, (1, 4, 24, 24)),
    "pangu": (pangu, (1, 10, 48, 48)),
}
