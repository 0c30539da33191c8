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

from credit.domain_parallel.binding import bind
from credit.domain_parallel.reshard import other_axis, reshard, whole
from credit.domain_parallel.rules.flips import roll
from credit.domain_parallel.rules.pointwise import align, lead, pointwise, result
from credit.domain_parallel.rules.reductions import amax, amin, axes_of, axis_of, drop
from credit.domain_parallel.slab import Declined, Slab, bound, is_slab, register_rule, rule, torch_functions


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


Dims = Callable[[Tensor, dict[str, Any]], Sequence[int]]


def _one(default: int | None) -> Dims:
    """The axis that `dim` tells."""

    def dims(x: Tensor, given: dict[str, Any]) -> Sequence[int]:
        dim = given.get("dim", default)
        if dim is None:
            raise Declined
        return (axis_of(x, dim),)

    return dims


def along(func: Any, dims: Dims) -> Callable:
    """The rule of a function of one tensor that runs along some axes, and keeps them.

    All its other arguments are handed on; one of them that is a tensor is not known to be cut.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        x = given and given.pop("input")
        if not is_slab(x) or any(isinstance(value, Tensor) for value in given.values()):  # type: ignore[union-attr]
            raise Declined
        return _tuples(func, elsewhere(lambda local: func(local, **given), x, dims(x, given)))  # type: ignore[arg-type]

    return call


def _tuples(func: Any, found: Any) -> Any:
    """Several results under the names that torch gives them."""
    kind = getattr(torch.return_types, func.__name__, None)
    return kind(found) if kind is not None and isinstance(found, tuple) else found


for _name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "softmax", "log_softmax", "F.softmin"):
    for _func in torch_functions(_name):
        register_rule(_func, along(_func, _one(None)))
for _name in ("diff", "sort", "argsort", "topk", "F.glu"):
    for _func in torch_functions(_name):
        register_rule(_func, along(_func, _one(-1)))


def _pick(func: Any, extreme: Any) -> Any:
    """max, min, median: over all, of two tensors, or (values, indices) along an axis."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None:
            raise Declined
        if "other" in given:
            return pointwise(func)(given["input"], given["other"])
        if "dim" in given:
            return _reduced(func, given)
        if extreme is None or not given["input"].is_floating_point():
            raise Declined
        return extreme(given["input"])

    return call


def _dropped(x: Tensor, dim: int, keepdim: bool) -> Any:
    if keepdim:
        return x
    return drop(x.local, x, (dim,), False) if is_slab(x) else x.squeeze(dim)


def _reduced(func: Any, given: dict[str, Any]) -> Any:
    """func(**given), which leaves one entry of an axis, for every other index."""
    x, dim, keepdim = given.pop("input"), given.pop("dim", None), given.pop("keepdim", False)
    if dim is None or not is_slab(x) or any(isinstance(value, Tensor) for value in given.values()):
        raise Declined
    axes = axes_of(x, dim)
    out = elsewhere(lambda local: func(local, dim=dim, keepdim=True, **given), x, axes)

    def dropped(one: Tensor) -> Any:
        for axis in reversed(axes):
            one = _dropped(one, axis, keepdim)
        return one

    return _tuples(func, tuple(map(dropped, out))) if isinstance(out, tuple) else dropped(out)


for _name, _extreme in (("max", amax), ("min", amin), ("median", None), ("nanmedian", None)):
    for _func in torch_functions(_name):
        register_rule(_func, _pick(_func, _extreme))


def _reducing(func: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None:
            raise Declined
        return _reduced(func, given)

    return call


for _name in (
    "quantile",
    "nanquantile",
    "argmax",
    "argmin",
    "logsumexp",
    "nanmean",
    "nansum",
    "prod",
    "mode",
    "kthvalue",
):
    for _func in torch_functions(_name):
        register_rule(_func, _reducing(_func))


def _fourier_dims(several: bool, default: Any) -> Dims:
    def dims(x: Tensor, given: dict[str, Any]) -> Sequence[int]:
        dim, lengths = given.get("dim", default), given.get("s")
        if several and dim is None:
            lengths = (lengths,) if isinstance(lengths, int) else lengths
            dim = range(-len(lengths), 0) if lengths is not None else range(-x.ndim, 0)
        return axes_of(x, dim)

    return dims


for _kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _name, _default in ((_kind, -1), (f"{_kind}2", (-2, -1)), (f"{_kind}n", None)):
        _func = getattr(torch.fft, _name)
        register_rule(_func, along(_func, _fourier_dims(not _name.endswith("fft"), _default)))


def _shifted(func: Any) -> Any:
    def call(input: Slab, dim: Any = None) -> Any:
        dims = [
            axis_of(input, d) for d in (range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim)
        ]
        sign = 1 if func is torch.fft.fftshift else -1
        shifts = [input.shape[d] // 2 if sign > 0 else (input.shape[d] + 1) // 2 for d in dims]
        return roll(input, shifts, dims)

    return call


for _name in ("fft.fftshift", "fft.ifftshift"):
    rule(_name)(_shifted(torch_functions(_name)[0]))


@rule("cosine_similarity")
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    like = lead((x1, x2))
    if (x1.shape, x1.ndim) != (x2.shape, x2.ndim):
        raise Declined
    axis = axis_of(like, dim)
    if axis == like.cut:
        cut = other_axis(like, (axis,))
        if cut is None:
            return F.cosine_similarity(whole(x1), whole(x2), dim, eps)
        like = reshard(like, cut)
    out = F.cosine_similarity(align(x1, like), align(x2, like), dim, eps)
    return like.like(out, like.cut - (axis < like.cut))


@rule("Tensor.unfold")
def unfold(input: Slab, dimension: int, size: int, step: int) -> Any:
    """Windows along an axis: (..., length, ...) to (..., windows, ..., size)."""
    axis = axis_of(input, dimension)
    if axis != input.cut:
        return input.like(input.local.unfold(axis, size, step), input.cut)
    cut = other_axis(input, (axis,))
    if cut is None:
        return whole(input).unfold(axis, size, step)
    there = reshard(input, cut)
    return back(there.local.unfold(axis, size, step), there, axis)


@rule("gradient")
def gradient(input: Slab, *, spacing: Any = None, dim: Any = None, edge_order: int = 1) -> Any:
    """A derivative along each of several axes, one after another."""
    dims = [dim] if isinstance(dim, int) else list(range(input.ndim)) if dim is None else [*dim]
    each = [*spacing] if isinstance(spacing, list | tuple) else [1 if spacing is None else spacing] * len(dims)
    if len(each) != len(dims):
        raise Declined

    def derivative(axis: int, step: Any) -> Any:
        steps = (whole(step),) if isinstance(step, Tensor) else step
        return elsewhere(
            lambda local: torch.gradient(local, spacing=steps, dim=axis, edge_order=edge_order)[0], input, (axis,)
        )

    return [derivative(axis_of(input, d), step) for d, step in zip(dims, each, strict=True)]


def _trapezoid(func: Any) -> Any:
    def call(y: Tensor, x: Any = None, *, dx: Any = 1, dim: int = -1) -> Any:
        if not is_slab(y) or (x is not None and (x.ndim != 1 or is_slab(x))):
            raise Declined
        axis = axis_of(y, dim)
        more = {"dx": dx} if x is None else {"x": x}
        if func is torch.cumulative_trapezoid:
            return elsewhere(lambda local: func(local, **more, dim=axis), y, (axis,))
        kept = elsewhere(lambda local: func(local, **more, dim=axis).unsqueeze(axis), y, (axis,))
        return _dropped(kept, axis, False)

    return call


for _name in ("trapezoid", "trapz", "cumulative_trapezoid"):
    for _func in torch_functions(_name):
        register_rule(_func, bound(_func, _trapezoid(_func), {}))


for _name, _axes in (("1d", 1), ("2d", 2), ("3d", 3)):
    for _kind in (f"max_pool{_name}_with_indices", f"adaptive_max_pool{_name}_with_indices"):
        _func = getattr(F, _kind)
        register_rule(_func, along(_func, lambda x, given, n=_axes: range(x.ndim - n, x.ndim)))  # type: ignore[misc]
