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
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.project(y.transpose(1, 2).reshape(batch, tokens, channels))


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
