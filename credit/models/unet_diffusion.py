"""Convolution on the sphere's latitude-longitude grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PeriodicConv2d(nn.Module):
    """A convolution that is circular in longitude and reflects at the poles.

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
        x = F.pad(x, (self.padding, self.padding, 0, 0), mode="circular")
        x = F.pad(x, (0, 0, self.padding, self.padding), mode="reflect")
        return self.conv(x)
