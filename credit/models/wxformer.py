"""WXFormer: a CrossFormer encoder and a convolutional decoder on the latitude-longitude grid, plain PyTorch.

Wang et al. 2021, CrossFormer (arXiv:2108.00154); Schreck et al. 2024 (arXiv:2411.07814).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.models.attention import DynamicPositionBias, WindowAttention
from credit.models.spectral_norm import normalize_weights
from credit.models.sphere import PeriodicConv2d, pad_on_sphere
from credit.models.transformer import ChannelNorm
from credit.models.unet import ResidualBlock


class CrossEmbedLayer(nn.Module):
    """Patches of several sizes around the same centres: parallel convolutions of one stride, side by side.

    Each kernel has half of the channels of the next smaller one; the two largest have as many.

    Args:
        in_channels, out_channels: of the field and of its embedding.
        kernels: their sizes; each exceeds the stride by an even number, or equals it.
        stride: rows and columns of the field that make one of the embedding.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        kernels = sorted(kernels)
        widths = [out_channels // 2 ** (i + 1) for i in range(len(kernels) - 1)]
        widths.append(out_channels - sum(widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, kernel, stride, padding=(kernel - stride) // 2)
            for width, kernel in zip(widths, kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class FeedForward(nn.Module):
    """Two linear layers over the channels of each point."""

    _tp_col = "expand"
    _tp_row = "project"

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, ratio * channels)
        self.project = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x.movedim(1, -1)))).movedim(-1, 1)


class Transformer(nn.Module):
    """Attention among neighbours (short-distance), then among points spread over the globe (long-distance), each
    followed by a feed-forward network; all are added to what they read, normalised.

    Args:
        channels, heads: of the attention.
        local_window: rows and columns of a window of neighbours.
        global_window: rows and columns of points that are as far apart as there are windows.
        ratio: width of the feed-forward networks over `channels`.
    """

    def __init__(self, channels: int, heads: int, local_window: int, global_window: int, ratio: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(ChannelNorm(channels), part)
            for part in (
                WindowAttention(channels, heads, local_window, dynamic=True),
                FeedForward(channels, ratio),
                WindowAttention(channels, heads, global_window, dilated=True, dynamic=True),
                FeedForward(channels, ratio),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


def transposed(in_channels: int, out_channels: int, scale: int) -> nn.Module:
    """To a `scale` times finer grid by a transposed convolution."""
    beyond = scale // 2
    return nn.ConvTranspose2d(in_channels, out_channels, scale + 2 * beyond, scale, beyond)


def shuffled(in_channels: int, out_channels: int, scale: int) -> nn.Module:
    """To a `scale` times finer grid by a convolution whose channels become points (Shi et al. 2016)."""
    return nn.Sequential(PeriodicConv2d(in_channels, out_channels * scale**2), nn.PixelShuffle(scale))


class UpBlock(nn.Module):
    """To the finer grid of the encoder's features, which are joined: transposed convolution, residual block.

    Args:
        in_channels: of the coarse field.
        channels: of the finer features, and of the result.
        scale: rows and columns that one becomes.
        groups: of GroupNorm.
    """

    enlarge = staticmethod(transposed)

    def __init__(self, in_channels: int, channels: int, scale: int, groups: int) -> None:
        super().__init__()
        self.up = self.enlarge(in_channels, channels, scale)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.block = ResidualBlock(channels, groups)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.merge(torch.cat([self.up(x), skip], 1)))


class UpBlockPS(UpBlock):
    """`UpBlock` by pixel shuffle."""

    enlarge = staticmethod(shuffled)


DECODERS = {"transposed": UpBlock, "pixel_shuffle": UpBlockPS}


class WXFormer(nn.Module):
    """Fields to fields on one grid; starts as the zero map, so an untrained model forecasts persistence.

    The field is padded on the sphere, around the globe and across the poles, until strides and windows of every stage
    fit, and cropped at the end. Each stage of the encoder is a `CrossEmbedLayer` and `Transformer`s; the decoder goes
    back up through the stages' features.

    Args:
        in_channels, out_channels: of the input and output fields.
        grid: (latitudes, longitudes) of the whole globe.
        widths: channels of each stage.
        depths: `Transformer`s of each stage: a short- and a long-distance attention each.
        kernels: of each stage's `CrossEmbedLayer`.
        strides: how many times coarser each stage is than the one before.
        local_window: rows and columns of a window of short-distance attention.
        global_windows: of long-distance attention, for each stage.
        head_width: channels of a head of attention.
        ratio: width of the feed-forward networks over that of the stage.
        decoder: "transposed" (convolutions) or "pixel_shuffle".
        groups: of the decoder's GroupNorm.
        padding: rows and columns that are added on each side at least.
        spectral_norm: divide the weights of all layers but position biases and the last one by their spectral norm.

    Raises:
        ValueError: if the padded grid would need more rows or columns than there are, or the longitudes are odd.
    """

    fsdp_blocks = (Transformer, UpBlock, UpBlockPS)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        kernels: Sequence[Sequence[int]] = ((4, 8, 16, 32), (2, 4), (2, 4), (2, 4)),
        strides: Sequence[int] = (2, 2, 2, 2),
        local_window: int = 6,
        global_windows: Sequence[int] = (6, 6, 3, 3),
        head_width: int = 32,
        ratio: int = 4,
        decoder: str = "transposed",
        groups: int = 8,
        padding: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.columns = _pads(grid, padding, local_window, global_windows, strides)
        inputs = (in_channels, *widths)
        self.embed = nn.ModuleList(map(CrossEmbedLayer, inputs, widths, kernels, strides))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Transformer(width, width // head_width, local_window, window, ratio) for _ in range(depth)))
            for width, depth, window in zip(widths, depths, global_windows, strict=True)
        )
        up = DECODERS[decoder]
        finer = [up(b, a, s, groups) for a, b, s in zip(widths, widths[1:], strides[1:], strict=False)]
        self.up = nn.ModuleList(reversed(finer))
        self.norm = nn.GroupNorm(groups, widths[0])
        if spectral_norm:
            for part in (self.embed, self.stages, self.up):
                normalize_weights(part, but=(DynamicPositionBias,))
        self.head = up.enlarge(widths[0], out_channels, strides[0])
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude, longitude)."""
        x = pad_on_sphere(x, self.rows, self.columns)
        skips = []
        for embed, stage in zip(self.embed, self.stages, strict=True):
            # Attention and its norms work on the channels of a point, which then lie side by side.
            x = stage(embed(x).contiguous(memory_format=torch.channels_last))
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        x = self.head(F.silu(self.norm(x)))
        return F.pad(x, [-n for n in (*self.columns, *self.rows)])


def _pads(
    grid: tuple[int, int], padding: int, local_window: int, global_windows: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) for rows and columns."""
    unit, stride = 1, 1
    for window, step in zip(global_windows, strides, strict=True):
        stride *= step
        unit = lcm(unit, stride * lcm(local_window, window))
    pads = []
    for size, name in zip(grid, ("latitudes", "longitudes"), strict=True):
        missing = -(-(size + 2 * padding) // unit) * unit - size
        if missing - missing // 2 > size:
            raise ValueError(
                f"{size} {name} cannot be padded to {size + missing}, a multiple of {unit} that strides and windows "
                f"need: choose smaller strides, local_window or global_windows"
            )
        pads.append((missing // 2, missing - missing // 2))
    if any(pads[0]) and grid[1] % 2:
        raise ValueError(f"{grid[1]} longitudes: no point lies opposite another across the pole")
    return pads
