"""Attention in windows of a three-dimensional atmosphere, after Pangu-Weather (Bi et al. 2023), plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.models.attention import EarthAttention

Triple = tuple[int, int, int]
"""Of levels, latitudes and longitudes."""


def _geometry(levels: int, grid: tuple[int, int], patch: Triple) -> tuple[Triple, ...]:
    """The cubes that cover the atmosphere, by axis: their number, the padding on both sides, and the output padding
    that a transposed convolution needs to undo it."""
    level, latitude, longitude = (_cover(*axis) for axis in zip((levels, *grid), patch, strict=True))
    return tuple(zip(level, latitude, longitude, strict=True))


def _cover(length: int, patch: int) -> Triple:
    missing = -length % patch
    padding = (missing + 1) // 2
    return (length + missing) // patch, padding, 2 * padding - missing


class CubeEmbedding(nn.Module):
    """Cubes of the upper air and squares of the surface as points of one grid, the surface as the lowest level.

    Args:
        upper, levels, surface: variables on levels, how many levels, and variables without.
        grid: (latitudes, longitudes).
        patch: of a cube. The grid is padded with zeros, as much before as after.
        width: channels of a point.

    Attributes:
        grid: levels, latitudes and longitudes of the points.
    """

    def __init__(self, upper: int, levels: int, surface: int, grid: tuple[int, int], patch: Triple, width: int) -> None:
        super().__init__()
        (layers, *plane), padding, _ = _geometry(levels, grid, patch)
        self.levels, self.channels = levels, upper * levels
        self.grid = (layers + (surface > 0), plane[0], plane[1])
        self.upper = nn.Conv3d(upper, width, patch, patch, padding)
        self.surface = nn.Conv2d(surface, width, patch[1:], patch[1:], padding[1:]) if surface else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, latitude, longitude) to (batch, *grid, width)."""
        points = self.upper(x[:, : self.channels].unflatten(1, (-1, self.levels)))
        if self.surface is not None:
            points = torch.cat([self.surface(x[:, self.channels :]).unsqueeze(2), points], dim=2)
        return points.movedim(1, -1)


class PatchRecovery(nn.Module):
    """The way back from points to cubes and squares; see `CubeEmbedding`."""

    def __init__(self, upper: int, levels: int, surface: int, grid: tuple[int, int], patch: Triple, width: int) -> None:
        super().__init__()
        (self.levels, *_), padding, missing = _geometry(levels, grid, patch)
        self.upper = nn.ConvTranspose3d(width, upper, patch, patch, padding, missing)
        self.surface = None
        if surface:
            self.surface = nn.ConvTranspose2d(width, surface, patch[1:], patch[1:], padding[1:], missing[1:])

    def forward(self, points: Tensor) -> Tensor:
        """(batch, levels, latitude, longitude, width) to (batch, channels, latitude, longitude)."""
        points = points.movedim(-1, 1)
        x = self.upper(points[:, :, -self.levels :]).flatten(1, 2)
        return x if self.surface is None else torch.cat([x, self.surface(points[:, :, 0])], dim=1)


class EarthBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)), on (batch, level, latitude, longitude, channels)."""

    _tp_col = "expand"
    _tp_row = "project"

    def __init__(self, channels: int, heads: int, grid: Triple, window: Triple, shifted: bool) -> None:
        super().__init__()
        self.attention = EarthAttention(channels, heads, grid, window, shifted)
        self.norm1 = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.project(F.gelu(self.expand(x))))


class DownSample(nn.Module):
    """Half the latitudes (an odd one more is zeros) and longitudes, twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.linear = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, x.shape[2] % 2))
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)
        return self.linear(self.norm(x.flatten(4)))


class UpSample(nn.Module):
    """Back to so many latitudes and twice the longitudes, half the channels."""

    def __init__(self, channels: int, latitudes: int) -> None:
        super().__init__()
        self.latitudes = latitudes
        self.spread = nn.Linear(2 * channels, 4 * channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x).unflatten(-1, (2, 2, -1)).transpose(3, 4)
        x = x.flatten(4, 5).flatten(2, 3)[:, :, : self.latitudes]
        return self.linear(self.norm(x))


class Pangu(nn.Module):
    """Fields to fields on one grid; starts as the zero map, so an untrained model forecasts persistence.

    Cubes of the atmosphere become points; blocks of attention in windows, shifted in every other block, follow on
    the grid of the points, on half of it, and on the whole again, where what came first is put beside. The first
    `upper` x `levels` channels are the upper air, all levels of a variable together, from the ground up; the others,
    such as statics, are the surface.

    Args:
        in_channels, out_channels: of the input and output fields.
        grid: (latitudes, longitudes) of the whole globe.
        upper, levels: variables on levels, and how many levels.
        width: channels of a point.
        depth: number of blocks before the grid of the points is halved, and again after.
        coarse_depth: number of blocks in between, with twice the channels and heads; 0 to leave the grid as it is.
        heads: of attention.
        window: levels, latitudes and longitudes of a window of points.
        patch: levels, latitudes and longitudes of a cube.

    Raises:
        ValueError: if there are fewer channels than `upper` x `levels`, or the longitudes do not divide into cubes and
            windows, which could not be shifted around the globe.
    """

    fsdp_blocks = (EarthBlock,)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        upper: int,
        levels: int,
        width: int = 192,
        depth: int = 2,
        coarse_depth: int = 12,
        heads: int = 6,
        window: Triple = (2, 6, 12),
        patch: Triple = (2, 4, 4),
    ) -> None:
        super().__init__()
        if upper * levels > out_channels:
            raise ValueError(f"model.upper {upper} x model.levels {levels} are more than {out_channels} variables")
        across = patch[2] * window[2] * (2 if coarse_depth else 1)
        if grid[1] % across:
            raise ValueError(
                f"{grid[1]} longitudes do not divide into cubes and windows of {across}: choose other model.patch, "
                f"model.window"
            )
        self.embed = CubeEmbedding(upper, levels, in_channels - upper * levels, grid, patch, width)
        fine = self.embed.grid
        self.before = self._blocks(depth, width, heads, fine, window)
        self.coarse = nn.Sequential()
        if coarse_depth:
            coarse = (fine[0], (fine[1] + 1) // 2, fine[2] // 2)
            blocks = self._blocks(coarse_depth, 2 * width, 2 * heads, coarse, window)
            self.coarse = nn.Sequential(DownSample(width), *blocks, UpSample(width, fine[1]))
        self.after = self._blocks(depth, width, heads, fine, window)
        self.recover = PatchRecovery(upper, levels, out_channels - upper * levels, grid, patch, 2 * width)
        for parameter in self.recover.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def _blocks(number: int, channels: int, heads: int, grid: Triple, window: Triple) -> nn.Sequential:
        return nn.Sequential(*[EarthBlock(channels, heads, grid, window, i % 2 == 1) for i in range(number)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, latitude, longitude) to (batch, out_channels, latitude, longitude)."""
        skip = self.before(self.embed(x))
        return self.recover(torch.cat([skip, self.after(self.coarse(skip))], dim=-1))
