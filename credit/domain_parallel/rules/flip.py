"""Functions that turn a field about, or blank one side of a diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from credit.domain_parallel.reshard import own
from credit.domain_parallel.rules.axes import axis_of
from credit.domain_parallel.rules.reshape import rows_at, transpose
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule


def _triangle(function: Any) -> Any:
    """Entries beside a diagonal of the last two axes are zero, whatever they were."""

    def rule_(input: Slab, diagonal: int = 0) -> Slab:
        if input.ndim < 2:
            raise Declined
        others = ~function(torch.ones(input.shape[-2:], dtype=torch.bool, device=input.local.device), diagonal)
        mine = own(others, input.cut + 2 - input.ndim, input) if input.cut >= input.ndim - 2 else others
        return input.like(input.local.masked_fill(mine, 0))

    return rule_


rule("tril")(_triangle(torch.tril))
rule("triu")(_triangle(torch.triu))


@rule("rot90")
def rot90(input: Slab, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    if len(dims) != 2:
        raise Declined
    first, second = dims
    if k % 4 == 0:
        return input.like(input.local.clone())
    if k % 4 == 2:
        return flip(input, dims)
    turned = flip(input, second if k % 4 == 1 else first)
    return transpose(turned, first, second) if is_slab(turned) else turned.transpose(first, second)


@rule("flip")
def flip(input: Slab, dims: Any) -> Any:
    axes = [axis_of(input, d) for d in ((dims,) if isinstance(dims, int) else dims)]
    y = input.like(input.local.flip([d for d in axes if d != input.cut]))
    return rows_at(y, range(input.shape[input.cut] - 1, -1, -1)) if input.cut in axes else y


@rule("flipud")
def flipud(input: Slab) -> Any:
    return flip(input, 0)


@rule("fliplr")
def fliplr(input: Slab) -> Any:
    return flip(input, 1)


@rule("roll")
def roll(input: Slab, shifts: Any, dims: Any = ()) -> Any:
    shifts = (shifts,) if isinstance(shifts, int) else shifts
    dims = (dims,) if isinstance(dims, int) else dims
    if len(dims) != len(shifts):
        raise Declined  # without axes, the flattened field is shifted
    x = input
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(x, dim)
        length = x.shape[axis]
        if axis == x.cut:
            x = rows_at(x, [(row - shift) % length for row in range(length)] if shift % length else range(length))
        else:
            x = x.like(x.local.roll(shift, axis))
    return x
