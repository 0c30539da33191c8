"""Sums, means and extremes over axes; over the cut axis, the ranks' results are combined exactly."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.binding import bind
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import AllExtreme, AllSum, other_axis, reshard, whole
from credit.domain_parallel.rules.axes import Dims, axes_of, axis_of, drop, elsewhere, named
from credit.domain_parallel.rules.elementwise import align, lead, pointwise
from credit.domain_parallel.slab import Declined, Slab, is_slab, register_rule, rule, torch_functions


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


def drop_axis(x: Tensor, dim: int, keepdim: bool) -> Any:
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
            one = drop_axis(one, axis, keepdim)
        return one

    return named(func, tuple(map(dropped, out))) if isinstance(out, tuple) else dropped(out)


for _name, _of_all in (("max", amax), ("min", amin), ("median", None), ("nanmedian", None)):
    for _func in torch_functions(_name):
        register_rule(_func, _pick(_func, _of_all))


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
