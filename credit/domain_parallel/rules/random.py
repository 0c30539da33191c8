"""Random draws: the numbers of one device are drawn for the whole field, and each rank keeps its own.

The root of a converted model compares the ranks' generators (see `root`), so all draw the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.reshard import own
from credit.domain_parallel.rules.pointwise import updated, writable
from credit.domain_parallel.slab import RULES, Slab


def _whole_like(x: Slab, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of this global shape, stored as `x` is: torch draws in the order of memory."""
    local = x.local
    order = list(range(x.ndim))
    if not local.is_contiguous():
        order.sort(key=lambda axis: -local.stride()[axis])
    return torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)


def _dropped_out(func: Any, channels: bool = False) -> Any:
    def call(x: Slab, p: float = 0.5, training: bool = True, inplace: bool = False) -> Slab:
        if not training or p == 0:
            return x
        shape = tuple(x.shape)
        if channels:
            shape = (*shape[:2], *[1] * (x.ndim - 2))
        mask = func(_whole_like(x, shape).fill_(1), p, True)
        if shape[x.cut] > 1:
            mask = own(mask, x.cut, x)
        if not inplace:
            return x.like(x.local * mask)
        writable(x, "dropout")
        x.local.mul_(mask)
        return updated(x)

    return call


for _func in (F.dropout, torch.dropout):
    RULES[_func] = _dropped_out(torch.dropout)
for _func in (F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout):
    RULES[_func] = _dropped_out(torch.feature_dropout, channels=True)


def _drawn_like(func: Any) -> Any:
    def call(x: Slab, *args: Any, **kwargs: Any) -> Slab:
        drawn: Tensor = func(_whole_like(x, tuple(x.shape)), *args, **kwargs)
        return x.like(own(drawn, x.cut, x))

    return call


for _draw in (torch.rand_like, torch.randn_like, torch.randint_like):
    RULES[_draw] = _drawn_like(_draw)


def _filled(name: str) -> Any:
    def call(x: Slab, *args: Any, **kwargs: Any) -> Slab:
        writable(x, name)
        drawn: Tensor = getattr(_whole_like(x, tuple(x.shape)), name)(*args, **kwargs)
        x.local.copy_(own(drawn, x.cut, x))
        return x

    return call


for _name in ("normal_", "uniform_", "random_", "exponential_", "bernoulli_"):
    RULES[getattr(torch.Tensor, _name)] = _filled(_name)
