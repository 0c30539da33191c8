"""Sums, means and extremes over axes; over the cut axis, the ranks' results are combined exactly."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import AllExtreme, AllSum, whole
from credit.domain_parallel.slab import RULES, Slab, is_slab, refuse, rule, torch_functions

Dims = int | Sequence[int] | None


def axes_of(x: Tensor, dim: Dims) -> tuple[int, ...]:
    """The axes meant by `dim`, counted from the front; all of them for None or ()."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return tuple(sorted(d % x.ndim for d in dims)) or tuple(range(x.ndim))


def drop(local: Tensor, x: Slab, dims: tuple[int, ...], keepdim: bool) -> Any:
    """`local`, reduced over `dims` with these kept at length 1: whole if the cut was among them, else a slab."""
    if not keepdim:
        for d in reversed(dims):
            local = local.squeeze(d)
    if x.cut in dims:
        return local
    return x.like(local, x.cut if keepdim else x.cut - sum(d < x.cut for d in dims))


@rule("sum")
def sum_(x: Slab, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dims = axes_of(x, dim if axis is None else axis)
    local = x.local.sum(dims, keepdim=True, dtype=dtype)
    return drop(AllSum.apply(local, x.group) if x.cut in dims else local, x, dims, keepdim)


@rule("mean")
def mean(x: Slab, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    dims = axes_of(x, dim if axis is None else axis)
    if x.cut not in dims:
        return drop(x.local.mean(dims, keepdim=True, dtype=dtype), x, dims, keepdim)
    kind = dtype or x.dtype
    # Half-precision sums are carried in float32, as torch carries them inside its kernel.
    wide = torch.promote_types(kind, torch.float32)
    total = AllSum.apply(x.local.sum(dims, keepdim=True, dtype=wide), x.group)
    return drop((total / prod(x.shape[d] for d in dims)).to(kind), x, dims, keepdim)


def _extreme(sign: int) -> Any:
    def rule_(x: Slab, dim: Any = None, keepdim: bool = False) -> Any:
        dims = axes_of(x, dim)
        if x.cut in dims:
            return drop(AllExtreme.apply(x.local, dims, sign, x.group), x, dims, keepdim)
        return drop((torch.amax if sign > 0 else torch.amin)(x.local, dims, keepdim=True), x, dims, keepdim)

    return rule_


amax, amin = _extreme(1), _extreme(-1)
for _func in torch_functions("amax"):
    RULES[_func] = amax
for _func in torch_functions("amin"):
    RULES[_func] = amin


def _logical(func: Any, extreme: Any) -> Any:
    def rule_(x: Slab, dim: Any = None, keepdim: bool = False) -> Any:
        truth = extreme(x.like(x.local.ne(0).to(torch.uint8)), dim, keepdim)
        return truth.like(truth.local.bool()) if is_slab(truth) else truth.bool()

    return rule_


for _func in torch_functions("any"):
    RULES[_func] = _logical(_func, amax)
for _func in torch_functions("all"):
    RULES[_func] = _logical(_func, amin)


def _moments(x: Slab, dims: tuple[int, ...], correction: float) -> tuple[Any, Any]:
    """(variance, mean) over axes with the cut among them, by two passes, these axes kept."""
    count = prod(x.shape[d] for d in dims)
    center = AllSum.apply(x.local.sum(dims, keepdim=True), x.group) / count
    spread = (x.local - center).abs().square().sum(dims, keepdim=True)
    return AllSum.apply(spread, x.group) / max(count - correction, 0), center


def _variance_options(args: tuple, kwargs: dict) -> tuple[Any, float, bool]:
    """(dim, correction, keepdim) of torch.var and its kin: (unbiased) or (dim, unbiased, keepdim) or keywords."""
    args = list(args)  # type: ignore[assignment]
    dim = kwargs.pop("dim", None)
    if args and not isinstance(args[0], bool):
        dim = args.pop(0)  # type: ignore[attr-defined]
    unbiased = args.pop(0) if args else kwargs.pop("unbiased", True)  # type: ignore[attr-defined]
    keepdim = args.pop(0) if args else kwargs.pop("keepdim", False)  # type: ignore[attr-defined]
    correction = kwargs.pop("correction", None)
    return dim, float(unbiased) if correction is None else correction, keepdim


def _variance(func: Any) -> Any:
    def rule_(x: Slab, *args: Any, **kwargs: Any) -> Any:
        dim, correction, keepdim = _variance_options(args, kwargs)
        dims = axes_of(x, dim)
        if x.cut in dims:
            variance, center = _moments(x, dims, correction)
        else:
            variance, center = torch.var_mean(x.local, dims, correction=correction, keepdim=True)
        spread = drop(variance.sqrt() if "std" in func.__name__ else variance, x, dims, keepdim)
        return (spread, drop(center, x, dims, keepdim)) if "mean" in func.__name__ else spread

    return rule_


for _name in ("var", "std", "var_mean", "std_mean"):
    for _func in torch_functions(_name):
        RULES[_func] = _variance(_func)


def vector_norm(x: Slab, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The norm of the ranks' norms is the norm."""
    dims = axes_of(x, dim)
    local = torch.linalg.vector_norm(x.local, ord, dims, keepdim=True, dtype=dtype)
    if x.cut in dims and ord != 0:
        ranks = x.like(local.unsqueeze(0), 0, _one_a_rank(x))
        local = torch.linalg.vector_norm(whole(ranks), ord, 0)
    elif x.cut in dims:
        local = AllSum.apply(local, x.group)
    return drop(local, x, dims, keepdim)


def _one_a_rank(x: Slab) -> Partition:
    return Partition(x.group.size, x.group.size)


@rule("linalg.vector_norm")
def _vector_norm(x: Slab, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return vector_norm(x, ord, dim, keepdim, dtype)


@rule("Tensor.norm", "torch.norm")
def norm(x: Slab, p: Any = "fro", dim: Dims = None, keepdim: bool = False, out: None = None, dtype: Any = None) -> Any:
    if p == "nuc":
        refuse("the nuclear norm", "it has no rule")
    return vector_norm(x, 2 if p in ("fro", None) else p, dim, keepdim, dtype)
