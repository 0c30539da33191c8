"""A window transformer on the latitude-longitude grid, plain PyTorch: wide layers that tensor parallelism can cut."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from credit.models.attention import WindowAttention
from credit.models.sphere import PeriodicConv2d, zero_conv
from credit.models.unet import UpBlock


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each point of (batch, channels, latitude, longitude)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvMLP(nn.Module):
    """Two 1x1 convolutions and, between them, a depthwise one that tells a point its neighbours (Wang et al. 2022,
    PVT v2)."""

    _tp_col = "expand"
    _tp_row = "project"

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, ratio * channels, 1)
        self.mix = nn.Conv2d(ratio * channels, ratio * channels, 3, padding=(1, 0), groups=ratio * channels)
        self.project = nn.Conv2d(ratio * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.expand(x), (1, 1, 0, 0), mode="circular")
        return self.project(F.gelu(self.mix(y)))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shift)
        self.norm2 = ChannelNorm(channels)
        self.mlp = ConvMLP(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WindowTransformer(nn.Module):
    """Fields to fields on one grid; starts as the zero map, so an untrained model forecasts persistence.

    A convolution halves the grid, blocks with windows that are shifted in every other one (Liu et al. 2021, Swin
    Transformer) follow, and a transposed convolution brings the full grid back.

    Args:
        in_channels, out_channels: of the input and output fields.
        grid: (latitudes, longitudes) of the whole globe.
        width: channels of the blocks.
        depth: number of blocks.
        heads: of attention.
        window: rows and columns of a window on the halved grid.
        ratio: width of the mlp over that of the block.

    Raises:
        ValueError: if the halved longitudes do not divide into windows, which could not be shifted around the globe.
    """

    fsdp_blocks = (TransformerBlock, UpBlock)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        window: int = 4,
        ratio: int = 4,
    ) -> None:
        super().__init__()
        if grid[1] % (2 * window):
            raise ValueError(
                f"{grid[1]} longitudes do not divide into windows of 2 x {window}: choose another model.window"
            )
        self.stem = PeriodicConv2d(in_channels, width // 2)
        self.down = nn.Conv2d(width // 2, width, 3, stride=2, padding=(1, 0))
        shifts = [window // 2 * (i % 2) for i in range(depth)]
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, window, shift, ratio) for shift in shifts])
        self.up = UpBlock(width // 2, grid, blocks=1, groups=1)
        self.head = zero_conv(width // 2, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude, longitude)."""
        skip = self.stem(x)
        x = self.down(F.pad(skip, (1, 1, 0, 0), mode="circular"))
        return self.head(F.silu(self.up(self.blocks(x), skip)))
