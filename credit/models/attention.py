"""Attention over fields, in plain PyTorch: windows of the global grid, one axis at a time, or all points.

Sharded models need nothing else: a converted model deals the rows out by whole windows of the *global* grid, or
gathers keys and values, so a window never depends on how many ranks there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    """Multi-head softmax attention of (..., tokens, channels). Its heads may be cut over tensor-parallel ranks."""

    _tp_col = "qkv"
    _tp_row = "project"
    _tp_fused = 3

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(batch, ..., tokens, channels), with a bias of (... x heads, tokens, tokens): the same for all of a batch."""
        qkv = self.qkv(x).view(*x.shape[:-1], 3, self.heads, x.shape[-1] // self.heads).movedim((-3, -2), (0, -3))
        # Heads of different kinds of windows are heads to torch, whose fast kernels know a batch and heads alone.
        q, k, v = qkv.flatten(2, -3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.project(y.reshape(qkv.shape[1:]).transpose(-3, -2).flatten(-2))


class DynamicPositionBias(nn.Module):
    """What attention adds for two points of a window, a function of how far apart they are (Wang et al. 2021,
    CrossFormer): a small network of the offset, in rows and columns of the window.

    Args:
        hidden: width of the network.
        heads: of the attention.
        window: rows and columns of a window.
    """

    offsets: Tensor
    index: Tensor

    def __init__(self, hidden: int, heads: int, window: int) -> None:
        super().__init__()
        steps = torch.arange(window)
        row, column = (axis.flatten() for axis in torch.meshgrid(steps, steps, indexing="ij"))
        between = [axis[:, None] - axis[None, :] + window - 1 for axis in (row, column)]
        self.register_buffer("index", between[0] * (2 * window - 1) + between[1], persistent=False)
        reach = torch.arange(1.0 - window, window)
        self.register_buffer("offsets", torch.cartesian_prod(reach, reach), persistent=False)
        layers = [nn.Sequential(nn.Linear(n, hidden), nn.LayerNorm(hidden), nn.ReLU()) for n in (2, hidden)]
        # Without a bias, which would be the same for all keys and change nothing.
        self.network = nn.Sequential(*layers, nn.Linear(hidden, heads, bias=False))

    def forward(self) -> Tensor:
        """(heads, window x window queries, window x window keys)."""
        biases = self.network(self.offsets.to(next(self.network.parameters()).dtype))
        return biases[self.index].permute(2, 0, 1)


class WindowAttention(_Attention):
    """Attention within windows of (batch, channels, latitude, longitude).

    Args:
        channels, heads: of the attention.
        window: rows and columns of a window. The grid is padded with zeros to whole windows.
        shift: rows and columns by which the windows are moved, cyclically (Liu et al. 2021, Swin Transformer).
        dilated: a window takes points that lie as far apart as there are windows, for long-range attention
            (Wang et al. 2021, CrossFormer), instead of neighbours.
        dynamic: the position bias is a `DynamicPositionBias`, instead of one learnt number for two points.
    """

    bias: nn.Parameter | DynamicPositionBias

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        shift: int = 0,
        dilated: bool = False,
        dynamic: bool = False,
    ) -> None:
        super().__init__(channels, heads)
        self.window, self.shift, self.dilated = window, shift, dilated
        if dynamic:
            self.bias = DynamicPositionBias(max(channels // 4, 8), heads, window)
        else:
            self.bias = nn.Parameter(torch.zeros(heads, window * window, window * window))

    def forward(self, x: Tensor) -> Tensor:
        n, (rows, columns) = self.window, x.shape[-2:]
        if rows % n or columns % n:
            x = F.pad(x, (0, -columns % n, 0, -rows % n))
        x = x.permute(0, 2, 3, 1)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        batch, height, width, channels = x.shape
        if self.dilated:
            tiles, order, back = (n, height // n, n, width // n), (0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)
        else:
            tiles, order, back = (height // n, n, width // n, n), (0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5)
        windows = x.reshape(batch, *tiles, channels).permute(order)
        bias = self.bias() if isinstance(self.bias, DynamicPositionBias) else self.bias
        y = self.attend(windows.reshape(-1, n * n, channels), bias).reshape(windows.shape)
        y = y.permute(back).reshape(batch, height, width, channels)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return y[:, :rows, :columns].permute(0, 3, 1, 2)


class EarthAttention(_Attention):
    """Attention within windows of (batch, levels, latitudes, longitudes, channels), with a bias that knows where on
    Earth a window lies (Bi et al. 2023, Pangu-Weather).

    Windows at other levels or latitudes have biases of their own; along a latitude circle they share one. It depends
    on the levels and rows of both points, and on how many longitudes lie between them. The grid is padded to whole
    windows. Shifted windows go around the globe in longitude; what a shift brings together from both poles, or from
    top and bottom, does not see each other, and nothing sees the padding.

    Args:
        channels, heads: of the attention.
        grid: levels, latitudes, longitudes.
        window: of a window; must divide the longitudes.
        shifted: move the windows by half their size, along axes that have more than one.
    """

    visible: Tensor
    pair: Tensor

    def __init__(
        self, channels: int, heads: int, grid: tuple[int, int, int], window: tuple[int, int, int], shifted: bool
    ) -> None:
        super().__init__(channels, heads)
        sizes = tuple(zip(grid, window, strict=True))
        self.window = window
        self.shift = tuple(n // 2 if shifted and length > n else 0 for length, n in sizes)
        levels, rows, columns = window
        self.register_buffer("visible", self._visible(sizes), persistent=False)
        self.register_buffer("pair", _pairs(*window), persistent=False)
        pairs = (levels * rows) ** 2 * (2 * columns - 1)
        self.bias = nn.Parameter(torch.zeros(len(self.visible), heads, pairs))

    def _visible(self, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        """Whether a point sees another, (windows of a meridian, points, points)."""
        levels, rows = (_regions(*size, shift) for size, shift in zip(sizes[:2], self.shift[:2], strict=True))
        region = 4 * levels[:, None, :, None] + rows[None, :, None, :]
        region = region.flatten(2).flatten(0, 1).repeat_interleave(self.window[2], -1)
        return region[:, :, None] == region[:, None, :]

    def forward(self, x: Tensor) -> Tensor:
        window, (batch, levels, rows, _, channels) = self.window, x.shape
        x = F.pad(x, (0, 0, 0, 0, 0, -rows % window[1], 0, -levels % window[0]))
        x = x.roll([-shift for shift in self.shift], (1, 2, 3))
        tiles = [n for length, size in zip(x.shape[1:4], window, strict=True) for n in (length // size, size)]
        windows = x.reshape(batch, *tiles, channels).permute(0, 5, 1, 3, 2, 4, 6, 7)
        bias = self.bias[..., self.pair].masked_fill(~self.visible[:, None], -torch.inf).flatten(0, 1)
        y = self.attend(windows.flatten(4, 6).flatten(2, 3).flatten(0, 1), bias).reshape(windows.shape)
        y = y.permute(0, 2, 4, 3, 5, 1, 6, 7).reshape(x.shape).roll(self.shift, (1, 2, 3))
        return y[:, :levels, :rows]


def _regions(length: int, window: int, shift: int) -> Tensor:
    """Which of the regions 0 to 3 the places of an axis belong to once it is padded and shifted, (windows, window):
    what has come from the other end, and the padding, are regions of their own."""
    padded = length + -length % window
    place = torch.arange(shift, shift + padded)
    return (place // padded + 2 * (place % padded >= length)).view(-1, window)


def _pairs(levels: int, rows: int, columns: int) -> Tensor:
    """A number for each pair of points of a window, (points, points): equal for pairs that differ in longitude alone,
    and by as much."""
    level, row, column = torch.cartesian_prod(*map(torch.arange, (levels, rows, columns))).unbind(-1)
    pair = (level[:, None] * levels + level) * rows**2 + row[:, None] * rows + row
    return pair * (2 * columns - 1) + column[:, None] - column + columns - 1


class AxialAttention(_Attention):
    """Attention along one axis of (batch, channels, latitude, longitude): `axis` -2 or -1 (Ho et al. 2019)."""

    def __init__(self, channels: int, heads: int, axis: int) -> None:
        super().__init__(channels, heads)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        lines = x.movedim((1, self.axis), (-1, -2))
        y = self.attend(lines.flatten(0, 1)).reshape(lines.shape)
        return y.movedim((-1, -2), (1, self.axis))


class GlobalAttention(_Attention):
    """Attention of all points of (batch, channels, latitude, longitude) to all points."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)
