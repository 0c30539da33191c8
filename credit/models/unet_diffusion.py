"""A U-Net as diffusion models have it (Ho et al. 2020; Dhariwal and Nichol 2021), on the latitude-longitude grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.models.attention import GlobalAttention
from credit.models.sphere import PeriodicConv2d, halved, zero_conv
from credit.models.unet import ResidualBlock

PERIOD = 1e4
"""The ratio of the longest to the shortest period of the time embedding."""


def sinusoids(time: Tensor, channels: int) -> Tensor:
    """Sines and cosines of `time`, (batch,), with frequencies from 1 down to 1 / PERIOD: (batch, channels), in float32
    at least."""
    half = channels // 2
    frequencies = PERIOD ** -(torch.arange(half, device=time.device) / half)
    angles = time.to(torch.promote_types(time.dtype, torch.float32))[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimedBlock(ResidualBlock):
    """A residual block whose second norm is scaled and shifted as the time embedding says."""

    def __init__(self, channels: int, groups: int, embedding: int) -> None:
        super().__init__(channels, groups)
        self.modulate = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        scale, shift = self.modulate(time)[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(y * (1 + scale) + shift))


class TimedBlocks(nn.ModuleList):
    """A sequence of timed blocks."""

    def __init__(self, number: int, channels: int, groups: int, embedding: int) -> None:
        super().__init__([TimedBlock(channels, groups, embedding) for _ in range(number)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self:
            x = block(x, time)
        return x


class Down(nn.Module):
    """Half the grid, odd heights rounded up, twice the channels."""

    def __init__(self, channels: int, blocks: int, groups: int, embedding: int) -> None:
        super().__init__()
        self.conv = PeriodicConv2d(channels, 2 * channels, stride=2)
        self.blocks = TimedBlocks(blocks, 2 * channels, groups, embedding)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.blocks(self.conv(x), time)


class Up(nn.Module):
    """Back to the grid of the skip: nearest points, a convolution, then the skip."""

    def __init__(self, channels: int, blocks: int, groups: int, embedding: int) -> None:
        super().__init__()
        self.conv = PeriodicConv2d(2 * channels, channels)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.blocks = TimedBlocks(blocks, channels, groups, embedding)

    def forward(self, x: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, skip.shape[-2:], mode="nearest"))
        return self.blocks(self.merge(torch.cat([x, skip], dim=1)), time)


class Bottleneck(GlobalAttention):
    """x + attention(norm(x)), of all points to all."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__(channels, heads)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


class DiffusionUNet(nn.Module):
    """Fields and a time to fields on one grid; starts as the zero map, so an untrained model forecasts persistence.

    Args:
        in_channels, out_channels: of the input and output fields.
        grid: (latitudes, longitudes) of the whole globe.
        width: channels on the full grid, doubled at each level.
        levels: how many times the grid is halved.
        blocks: residual blocks per level and direction.
        groups: of GroupNorm.
        heads: of attention between all points of the coarsest grid; 0 for none. Tensor parallelism cuts these alone.

    Raises:
        ValueError: if the longitudes do not halve `levels` times.
    """

    fsdp_blocks = (Down, Up, Bottleneck)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        width: int = 32,
        levels: int = 2,
        blocks: int = 1,
        groups: int = 8,
        heads: int = 4,
    ) -> None:
        super().__init__()
        halved(grid, levels)
        widths = [width * 2**i for i in range(levels)]
        options = (blocks, groups, 4 * width)
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU())
        self.stem = PeriodicConv2d(in_channels, width)
        self.blocks = TimedBlocks(blocks, width, groups, 4 * width)
        self.down = nn.ModuleList([Down(channels, *options) for channels in widths])
        self.bottleneck = Bottleneck(width * 2**levels, heads, groups) if heads else nn.Identity()
        self.up = nn.ModuleList([Up(channels, *options) for channels in reversed(widths)])
        self.norm = nn.GroupNorm(groups, width)
        self.head = zero_conv(width, out_channels)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude, longitude).

        Args:
            time: (batch,), the diffusion step or noise level, of order 1 to 1000; zeros for a deterministic forecast.
        """
        time = x.new_zeros(x.shape[0]) if time is None else time
        time = self.time(sinusoids(time, self.width).to(x.dtype))
        x = self.blocks(self.stem(x), time)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x, time)
        x = self.bottleneck(x)
        for up in self.up:
            x = up(x, skips.pop(), time)
        return self.head(F.silu(self.norm(x)))
