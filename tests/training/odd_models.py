"""Models that hold what may depend on how a batch is shared out. Light to import, as every rank does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Stochastic depth over samples, and dropout on rows of windows that samples share an axis with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.mix(x))
        if self.training:
            y = y * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.7) / 0.7
        batch, channels, rows, columns = y.shape
        windows = F.dropout(y.permute(0, 3, 2, 1).reshape(batch * columns, rows, channels), 0.2, self.training)
        return x + windows.reshape(batch, columns, rows, channels).permute(0, 3, 2, 1)


class Odd(nn.Module):
    """Draws, running statistics, power iterations; a shared, a frozen, a scalar, an unused and a turned weight."""

    fsdp_blocks = (Block,)

    def __init__(self, in_channels: int, out_channels: int, grid: tuple[int, int], width: int = 8) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(in_channels, width, 3, padding=1))
        self.norm: nn.Module = nn.InstanceNorm2d(width, track_running_stats=True)
        self.one, self.two = Block(width), Block(width)
        self.two.mix.weight = self.one.mix.weight
        assert self.one.mix.bias is not None
        self.one.mix.bias.requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.aside = nn.Linear(3, 2)
        self.turned = nn.Parameter(torch.linspace(-1, 1, 5 * width).view(5, width).t())
        self.last = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.norm(self.first(x))), 0.3, self.training)
        x = self.two(self.one(x))
        x = x + (x.movedim(1, -1) @ self.turned @ self.turned.t()).movedim(-1, 1)
        return self.last(self.gain * x)


class _Clip(torch.autograd.Function):
    """The gradient of each entry is at most that of a loss of a few of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-2e-4, 2e-4)


class Clipped(Odd):
    """Clips gradients on their way, by a number."""

    def forward(self, x: Tensor) -> Tensor:
        x = _Clip.apply(self.first(x))
        if x.requires_grad:
            x.register_hook(lambda grad: grad.clamp(max=1e-4))
        return self.last(torch.tanh(x))


class Normed(Odd):
    """Mixes samples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.turned.shape[0])


class Turned(Odd):
    """Has the samples as the second axis of what it draws."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * F.dropout(x.new_ones(1, len(x), 1, 1), 0.3, self.training).transpose(0, 1)


class Lost(Odd):
    """Counts in a buffer that checkpoints do not hold."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)


class Elsewhere(Odd):
    """Draws with numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(1 + 0.1 * np.random.rand())


class HasRoot(Odd):
    """In some calls the gradient is not finite and the loss is: a square root of zero."""

    def __init__(self, *args: Any, at: int = 0, until: int = 10**9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.at, self.until, self.calls = at, until, 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.at <= self.calls < self.until:
                y = y + torch.sqrt((y - y).square().sum())
        return y
