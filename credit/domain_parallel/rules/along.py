"""Functions along one or several axes that treat all others alike: Fourier transforms, softmax, sorting, ...

Where the cut axis is among those they run along, the tensor is transposed over the ranks (cut along another axis),
the function is local, and the result is transposed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.reshard import other_axis, reshard, whole
from credit.domain_parallel.rules.pointwise import align, pointwise, result
from credit.domain_parallel.rules.reductions import amax, amin, axes_of, drop
from credit.domain_parallel.rules.views import roll
from credit.domain_parallel.slab import RULES, Slab, either, is_slab, refuse, rule, torch_functions


def elsewhere(function: Callable[[Tensor], Any], x: Slab, axes: Sequence[int]) -> Any:
    """function(x), which runs along `axes` and keeps their number, with none of them cut while it runs."""
    if x.cut not in axes:
        return result(function(x.local), x)
    cut = other_axis(x, tuple(axes))
    if cut is None:
        return function(whole(x))
    there = reshard(x, cut)
    return _back(function(there.local), there, x.cut)


def _back(out: Any, there: Slab, cut: int) -> Any:
    if isinstance(out, tuple | list):
        return tuple(_back(one, there, cut) for one in out)
    moved = there.like(out)
    return reshard(moved, cut) if moved.shape[cut] >= moved.group.size else whole(moved)


def _along(func: Any, default: int = -1) -> Any:
    def call(x: Slab, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.pop("axis", kwargs.pop("dim", None))
        if dim is None:
            dim, args = (args[0], args[1:]) if args and isinstance(args[0], int) else (default, args)
        return elsewhere(lambda local: func(local, dim=dim % x.ndim, **kwargs), x, [dim % x.ndim])

    return call


def _softmax(func: Any) -> Any:
    def call(x: Slab, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **kwargs: Any) -> Any:
        if dim is None:
            refuse(f"{func.__name__} without dim", "the axis is not told")
        return elsewhere(lambda local: func(local, dim=dim, dtype=dtype), x, [dim % x.ndim])

    return call


for _name in ("softmax", "log_softmax", "F.softmin"):
    for _func in torch_functions(_name):
        RULES[_func] = _softmax(_func)
for _name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "F.glu", "diff"):
    for _func in torch_functions(_name):
        RULES[_func] = _along(_func)


@rule("sort")
def sort(x: Slab, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    values = elsewhere(
        lambda local: tuple(torch.sort(local, dim=dim, descending=descending, stable=stable)), x, [dim % x.ndim]
    )
    return torch.return_types.sort(values)


@rule("argsort")
def argsort(x: Slab, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return sort(x, dim, descending, stable)[1]


@rule("topk")
def topk(x: Slab, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    found = elsewhere(lambda local: tuple(torch.topk(local, k, dim, largest, sorted)), x, [dim % x.ndim])
    return torch.return_types.topk(found)


def _pick(func: Any, extreme: Any) -> Any:
    """max, min, median: over all, of two tensors, or (values, indices) along an axis."""

    def call(x: Slab, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor):
            return pointwise(func)(x, other)
        if not args and not kwargs:
            if extreme is None:
                refuse(f"{func.__name__} over all axes", "it has no rule")
            return extreme(x)
        dim = args[0] if args else kwargs["dim"]
        keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
        pair = elsewhere(lambda local: tuple(func(local, dim, True)), x, [dim % x.ndim])
        pair = [_dropped(one, dim % x.ndim, keepdim) for one in pair]
        return getattr(torch.return_types, func.__name__)(pair)

    return call


def _dropped(x: Tensor, dim: int, keepdim: bool) -> Any:
    if keepdim:
        return x
    return drop(x.local, x, (dim,), False) if is_slab(x) else x.squeeze(dim)


for _name, _extreme in (("max", amax), ("min", amin), ("median", None)):
    for _func in (getattr(torch, _name), getattr(torch.Tensor, _name)):
        RULES[_func] = _pick(_func, _extreme)


def _reducing(func: Any) -> Any:
    """One axis, which is dropped unless keepdim."""

    def call(x: Slab, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        if dim is None:
            refuse(f"{func.__name__} over all axes", "it has no rule")
        axes = axes_of(x, dim)
        out = elsewhere(lambda local: func(local, dim=dim, keepdim=True, **kwargs), x, axes)
        for axis in reversed(axes):
            out = _dropped(out, axis, keepdim)
        return out

    return call


for _name in ("argmax", "argmin", "logsumexp", "nanmean", "nansum", "prod", "quantile", "nanmedian"):
    for _func in torch_functions(_name):
        RULES[_func] = _reducing(_func)


def _fourier(func: Any) -> Any:
    several = func.__name__.endswith(("2", "n"))

    def call(x: Slab, *args: Any, **kwargs: Any) -> Any:
        names = ("s", "dim", "norm") if several else ("n", "dim", "norm")
        kwargs |= dict(zip(names, args, strict=False))
        dims = kwargs.get("dim") or ((-2, -1) if func.__name__.endswith("2") else None if several else -1)
        if dims is None:
            dims = range(-len(kwargs["s"]), 0) if kwargs.get("s") is not None else range(-x.ndim, 0)
        return elsewhere(lambda local: func(local, **kwargs), x, axes_of(x, dims))

    return call


for _kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _name in (_kind, f"{_kind}2", f"{_kind}n"):
        _func = getattr(torch.fft, _name)
        RULES[_func] = _fourier(_func)


def _shifted(func: Any) -> Any:
    def call(x: Slab, dim: Any = None) -> Any:
        dims = axes_of(x, dim)
        sign = 1 if func is torch.fft.fftshift else -1
        shifts = [x.shape[d] // 2 if sign > 0 else (x.shape[d] + 1) // 2 for d in dims]
        return roll(x, shifts, dims)

    return call


for _func in (torch.fft.fftshift, torch.fft.ifftshift):
    RULES[_func] = _shifted(_func)


@rule("cosine_similarity")
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    like = either(x1, x2)
    if dim % like.ndim == like.cut:
        cut = other_axis(like, (dim % like.ndim,))
        if cut is None:
            return F.cosine_similarity(whole(x1), whole(x2), dim, eps)
        like = reshard(like, cut)
    out = F.cosine_similarity(align(x1, like), align(x2, like), dim, eps)
    return like.like(out, like.cut - (dim % like.ndim < like.cut))


@rule("Tensor.unfold")
def unfold(x: Slab, dimension: int, size: int, step: int) -> Any:
    """Windows along an axis: (..., length, ...) to (..., windows, ..., size)."""
    axis = dimension % x.ndim
    if axis != x.cut:
        return x.like(x.local.unfold(axis, size, step), x.cut)
    cut = other_axis(x, (axis,))
    if cut is None:
        return whole(x).unfold(axis, size, step)
    there = reshard(x, cut)
    moved = there.like(there.local.unfold(axis, size, step))
    return reshard(moved, axis) if moved.shape[axis] >= x.group.size else whole(moved)


@rule("gather", "take_along_dim")
def gather(x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Any:
    if isinstance(dim, Tensor):
        dim, index = index, dim
    like = either(x, index)
    if dim % like.ndim != like.cut and is_slab(x):
        return like.like(torch.gather(x.local, dim, align(index, like)))
    return torch.gather(whole(x), dim, whole(index))
