"""Padding and convolution of a latitude-longitude grid on the sphere, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sides = int | tuple[int, int]
"""As many on both sides, or (before, after)."""


def pad_on_sphere(x: Tensor, rows: Sides, columns: Sides) -> Tensor:
    """Pad (..., latitude, longitude): around the globe in longitude, across the poles in latitude.

    The k-th row beyond a pole is the k-th row from it, seen from the other side: shifted by half the longitudes.
    For grids without points on the poles; with them, the pole row itself comes first.

    Raises:
        ValueError: if the longitudes are odd in number, so that no point lies opposite.
    """
    (first, last), (west, east) = ((n, n) if isinstance(n, int) else n for n in (rows, columns))
    if first or last:
        if x.shape[-1] % 2:
            raise ValueError(f"{x.shape[-1]} longitudes: no point lies opposite another across the pole")
        half = x.shape[-1] // 2
        before = x[..., :first, :].flip(-2).roll(half, -1)
        after = x[..., x.shape[-2] - last :, :].flip(-2).roll(half, -1)
        x = torch.cat([before, x, after], -2)
    return F.pad(x, (west, east, 0, 0), mode="circular") if west or east else x


class Sided(nn.Module):
    """A module that pads longitudes, in the mode `sides`: around the globe, unless it is told otherwise."""

    sides = "circular"


def reflect_at_all_sides(model: nn.Module) -> nn.Module:
    """The model, of a region: what it pads around the globe is reflected in the east and west, as at the poles."""
    for module in model.modules():
        if isinstance(module, Sided):
            module.sides = "reflect"
    return model


class PeriodicConv2d(Sided):
    """A convolution that is circular in longitude (see `Sided`) and reflects at the poles.

    Args:
        in_channels, out_channels, kernel_size, stride, bias: as in `nn.Conv2d`.
        padding: rows and columns added on each side, (kernel_size - 1) / 2 by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.padding = (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=0, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude', longitude')."""
        x = F.pad(x, (self.padding, self.padding, 0, 0), mode=self.sides)
        x = F.pad(x, (0, 0, self.padding, self.padding), mode="reflect")
        return self.conv(x)


def zero_conv(in_channels: int, out_channels: int) -> PeriodicConv2d:
    """A convolution that begins as the zero map."""
    layer = PeriodicConv2d(in_channels, out_channels)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def halved(grid: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """The grid, and what it is after each of so many convolutions of stride 2.

    Raises:
        ValueError: if the longitudes do not halve as often.
    """
    if grid[1] % 2**levels:
        raise ValueError(f"{grid[1]} longitudes do not halve {levels} times: choose fewer model.levels")
    sizes = [grid]
    for _ in range(levels):
        sizes.append(((sizes[-1][0] + 1) // 2, sizes[-1][1] // 2))
    return sizes
