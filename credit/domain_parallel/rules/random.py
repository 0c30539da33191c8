"""Random draws: the numbers of one device are drawn for the whole field, and each rank keeps its own.

The root of a converted model compares the ranks' generators (see `root`), so all draw the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.reshard import own
from credit.domain_parallel.slab import Declined, Slab, register_rule, rule


def _whole_like(x: Slab, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of this global shape, stored as `x` is: torch draws in the order of memory."""
    meta = torch.empty_strided(tuple(x.shape), x.strides, device="meta") if x.strides else None
    stored = torch.empty_like(meta).stride() if meta is not None else None
    order = sorted(range(x.ndim), key=lambda axis: -stored[axis]) if stored else list(range(x.ndim))
    return torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)


def _dropped_out(func: Any, channels: int | None = None) -> Any:
    """The rule of dropout; of whole channels, for so many axes after them, where `channels` tells."""

    def call(input: Slab, p: float = 0.5, training: bool = True, inplace: bool = False) -> Slab:
        if not 0 <= p <= 1:
            raise Declined
        if not training or p == 0:
            return input
        shape = tuple(input.shape)
        if channels is not None:
            if input.ndim != channels + 2:
                raise Declined  # without a batch, or another axis, torch takes other axes for channels
            shape = (*shape[:2], *[1] * channels)
        mask = func(_whole_like(input, shape).fill_(1), p, True)
        if shape[input.cut] > 1:
            mask = own(mask, input.cut, input)
        if not inplace:
            return input.like(input.local * mask)
        input.local.mul_(mask)
        return input

    return call


_dropout = rule("F.dropout")(_dropped_out(torch.dropout))


@rule("torch.dropout", train="training")
def dropout(input: Slab, p: float, training: bool) -> Slab:
    return _dropout(input, p, training)


rule("F.dropout2d")(_dropped_out(torch.feature_dropout, 2))
rule("F.dropout3d")(_dropped_out(torch.feature_dropout, 3))


def _drawn_like(func: Any) -> Any:
    def call(input: Slab, *args: Any, **kwargs: Any) -> Slab:
        if any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            raise Declined
        drawn: Tensor = func(_whole_like(input, tuple(input.shape)), *args, **kwargs)
        return input.like(own(drawn, input.cut, input))

    return call


for _draw in (torch.rand_like, torch.randn_like, torch.randint_like):
    register_rule(_draw, _drawn_like(_draw))


def _filled(name: str) -> Any:
    def call(input: Slab, *args: Any, **kwargs: Any) -> Slab:
        if any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            raise Declined
        empty = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        if input.strides is not None:
            if 0 in input.strides:
                raise Declined
            empty = torch.empty_strided(input.shape, input.strides, dtype=input.dtype, device=input.device)
        drawn: Tensor = getattr(empty, name)(*args, **kwargs)
        input.local.copy_(own(drawn, input.cut, input))
        return input

    return call


for _name in ("normal_", "uniform_", "random_", "exponential_", "bernoulli_"):
    register_rule(getattr(torch.Tensor, _name), _filled(_name))
