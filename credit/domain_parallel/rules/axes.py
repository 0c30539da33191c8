"""Which axes are meant, and functions along axes, with none of these cut while they run.

Where the cut axis is among those they run along, the tensor is transposed over the ranks (cut along another axis),
the function is local, and the result is transposed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.binding import bind
from credit.domain_parallel.reshard import other_axis, reshard, whole
from credit.domain_parallel.rules.elementwise import result
from credit.domain_parallel.slab import Declined, Slab, is_slab

Dims = int | Sequence[int] | None


def axis_of(x: Tensor, dim: int) -> int:
    """The axis meant by `dim`, counted from the front.

    Raises:
        IndexError: as torch's, if there is none.
    """
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.ndim}, {x.ndim - 1}], but got {dim})"
        )
    return dim % x.ndim


def axes_of(x: Tensor, dim: Dims) -> tuple[int, ...]:
    """The axes meant by `dim`, counted from the front; all of them for None or ()."""
    dims = (dim,) if isinstance(dim, int) else tuple(() if dim is None else dim)
    axes = tuple(sorted(axis_of(x, d) for d in dims))
    if len(set(axes)) < len(axes):
        raise RuntimeError(
            f"dim {next(d for d in axes if axes.count(d) > 1)} appears multiple times in the list of dims"
        )
    return axes or tuple(range(x.ndim))


def drop(local: Tensor, x: Slab, dims: tuple[int, ...], keepdim: bool) -> Any:
    """`local`, reduced over `dims` with these kept at length 1: whole if the cut was among them, else a slab."""
    if not keepdim:
        for d in reversed(dims):
            local = local.squeeze(d)
    if x.cut in dims:
        return local
    return x.like(local, x.cut if keepdim else x.cut - sum(d < x.cut for d in dims))


def elsewhere(function: Callable[[Tensor], Any], x: Slab, axes: Sequence[int]) -> Any:
    """function(x), which runs along `axes` and keeps their number, with none of them cut while it runs."""
    if x.cut not in axes:
        return result(function(x.local), x)
    cut = other_axis(x, tuple(axes))
    if cut is None:
        return function(whole(x))
    there = reshard(x, cut)
    return back(function(there.local), there, x.cut)


def back(out: Any, there: Slab, cut: int) -> Any:
    """What was computed on the rows of `there`, cut along `cut` again; whole where that is too short."""
    if there.cut == cut:
        return result(out, there)
    if isinstance(out, tuple | list):
        return tuple(back(one, there, cut) for one in out)
    moved = there.like(out)
    return reshard(moved, cut) if moved.shape[cut] >= moved.group.size else whole(moved)


AxesOf = Callable[[Tensor, dict[str, Any]], Sequence[int]]
"""The axes that a function runs along, of its tensor and its other arguments."""


def one_axis(default: int | None) -> AxesOf:
    """The axis that `dim` tells."""

    def dims(x: Tensor, given: dict[str, Any]) -> Sequence[int]:
        dim = given.get("dim", default)
        if dim is None:
            raise Declined
        return (axis_of(x, dim),)

    return dims


def along(func: Any, dims: AxesOf) -> Callable:
    """The rule of a function of one tensor that runs along some axes, and keeps them.

    All its other arguments are handed on; one of them that is a tensor is not known to be cut.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        x = given and given.pop("input")
        if not is_slab(x) or any(isinstance(value, Tensor) for value in given.values()):  # type: ignore[union-attr]
            raise Declined
        return named(func, elsewhere(lambda local: func(local, **given), x, dims(x, given)))  # type: ignore[arg-type]

    return call


def named(func: Any, found: Any) -> Any:
    """Several results under the names that torch gives them."""
    kind = getattr(torch.return_types, func.__name__, None)
    return kind(found) if kind is not None and isinstance(found, tuple) else found
