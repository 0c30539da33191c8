"""A small residual U-Net on the latitude-longitude grid, plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.models.sphere import PeriodicConv2d, Sided, halved, zero_conv


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), channels kept."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = PeriodicConv2d(channels, channels, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = PeriodicConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class DownBlock(Sided):
    """Half the grid, twice the channels: a strided convolution, then residual blocks."""

    def __init__(self, channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=(1, 0))
        self.blocks = nn.Sequential(*[ResidualBlock(2 * channels, groups) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv(F.pad(x, (1, 1, 0, 0), mode=self.sides)))


class UpBlock(Sided):
    """Back to a finer grid of `size`: a transposed convolution beside a resized shortcut, then the skip."""

    def __init__(self, channels: int, size: tuple[int, int], blocks: int, groups: int) -> None:
        super().__init__()
        height, width = size
        # Rows: (coarse - 1) * 2 + 1 + output_padding undoes the halving of odd and even heights. Columns: one more
        # column on each side, cut off again.
        odd = height % 2
        self.conv = nn.ConvTranspose2d(2 * channels, channels, 3, stride=2, padding=1, output_padding=(1 - odd, 0))
        self.resize = nn.Upsample(size=size, mode="nearest")
        self.project = nn.Conv2d(2 * channels, channels, 1)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.width = width
        self.blocks = nn.Sequential(*[ResidualBlock(channels, groups) for _ in range(blocks)])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        finer = self.conv(F.pad(x, (1, 1, 0, 0), mode=self.sides))[..., 2 : 2 + self.width]
        finer = finer + self.resize(self.project(x))
        return self.blocks(self.merge(torch.cat([finer, skip], dim=1)))


class UNet(nn.Module):
    """Fields to fields on one grid; starts as the zero map, so an untrained model forecasts persistence.

    Args:
        in_channels, out_channels: of the input and output fields.
        grid: (latitudes, longitudes) of the whole globe.
        width: channels on the full grid, doubled at each level.
        levels: how many times the grid is halved.
        blocks: residual blocks per level and direction.
        groups: of GroupNorm.

    Raises:
        ValueError: if the longitudes do not halve `levels` times.
    """

    fsdp_blocks = (DownBlock, UpBlock)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        width: int = 32,
        levels: int = 2,
        blocks: int = 1,
        groups: int = 8,
    ) -> None:
        super().__init__()
        sizes = halved(grid, levels)
        self.stem = PeriodicConv2d(in_channels, width)
        self.blocks = nn.Sequential(*[ResidualBlock(width, groups) for _ in range(blocks)])
        self.down = nn.ModuleList([DownBlock(width * 2**i, blocks, groups) for i in range(levels)])
        self.up = nn.ModuleList([UpBlock(width * 2**i, sizes[i], blocks, groups) for i in reversed(range(levels))])
        self.norm = nn.GroupNorm(groups, width)
        self.head = zero_conv(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude, longitude)."""
        x = self.blocks(self.stem(x))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(F.silu(self.norm(x)))
