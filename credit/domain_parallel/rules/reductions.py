"""Sums, means and extremes over axes; over the cut axis, the ranks' results are combined exactly."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import AllExtreme, AllSum, whole
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule

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


@rule("sum")
def sum_(input: Slab, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = axes_of(input, dim)
    local = input.local.sum(dims, keepdim=True, dtype=dtype)
    return drop(AllSum.apply(local, input.group) if input.cut in dims else local, input, dims, keepdim)


@rule("mean")
def mean(input: Slab, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = axes_of(input, dim)
    if input.cut not in dims:
        return drop(input.local.mean(dims, keepdim=True, dtype=dtype), input, dims, keepdim)
    kind = dtype or input.dtype
    if not (kind.is_floating_point or kind.is_complex):
        raise Declined
    # Half-precision sums are carried in float32, as torch carries them inside its kernel.
    wide = torch.promote_types(kind, torch.float32)
    total = AllSum.apply(input.local.sum(dims, keepdim=True, dtype=wide), input.group)
    return drop((total / prod(input.shape[d] for d in dims)).to(kind), input, dims, keepdim)


def _extreme(sign: int) -> Any:
    def rule_(input: Slab, dim: Any = (), keepdim: bool = False) -> Any:
        dims = axes_of(input, dim)
        if input.cut in dims:
            return drop(AllExtreme.apply(input.local, dims, sign, input.group), input, dims, keepdim)
        return drop((torch.amax if sign > 0 else torch.amin)(input.local, dims, keepdim=True), input, dims, keepdim)

    return rule_


amax, amin = _extreme(1), _extreme(-1)
rule("amax")(amax)
rule("amin")(amin)


def _logical(extreme: Any) -> Any:
    def rule_(input: Slab, dim: Any = None, keepdim: bool = False) -> Any:
        truth = extreme(input.like(input.local.ne(0).to(torch.uint8)), dim, keepdim)
        kind = torch.uint8 if input.dtype == torch.uint8 else torch.bool
        return truth.like(truth.local.to(kind)) if is_slab(truth) else truth.to(kind)

    return rule_


rule("any")(_logical(amax))
rule("all")(_logical(amin))


def _moments(x: Slab, dims: tuple[int, ...], correction: float) -> tuple[Any, Any]:
    """(variance, mean) over axes with the cut among them, by two passes, these axes kept."""
    count = prod(x.shape[d] for d in dims)
    center = AllSum.apply(x.local.sum(dims, keepdim=True), x.group) / count
    spread = (x.local - center).abs().square().sum(dims, keepdim=True)
    return AllSum.apply(spread, x.group) / max(count - correction, 0), center


class _Root(torch.autograd.Function):
    """The square root; where it is zero it hands on no cotangent, as torch's standard deviation does."""

    @staticmethod
    def forward(ctx: Any, variance: Tensor) -> Tensor:
        root = variance.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return (grad / (2 * root)).masked_fill(root == 0, 0)


def _variance(root: bool, with_mean: bool) -> Any:
    def rule_(
        input: Slab,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        *,
        correction: float | None = None,
    ) -> Any:
        dims = axes_of(input, dim)
        correction = float(unbiased) if correction is None else correction
        if input.cut in dims:
            if not input.is_floating_point() or torch.finfo(input.dtype).bits < 32:
                raise Declined
            spread, center = _moments(input, dims, correction)
            spread = _Root.apply(spread) if root else spread
        else:
            both = torch.std_mean if root else torch.var_mean
            spread, center = both(input.local, dims, correction=correction, keepdim=True)
        spread = drop(spread, input, dims, keepdim)
        return (spread, drop(center, input, dims, keepdim)) if with_mean else spread

    return rule_


for _name in ("var", "std", "var_mean", "std_mean"):
    rule(_name)(_variance("std" in _name, "mean" in _name))


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
def _vector_norm(input: Slab, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return vector_norm(input, ord, dim, keepdim, dtype)


@rule("Tensor.norm", "torch.norm")
def norm(input: Slab, p: Any = "fro", dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if p == "nuc":
        raise Declined
    return vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim, dtype)
