"""Losses: of corresponding entries, or of classes; their sums and means are those of the whole field."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.binding import bind
from credit.domain_parallel.reshard import AllSum, cut_along
from credit.domain_parallel.rules.composite import run_body
from credit.domain_parallel.rules.elementwise import pointwise
from credit.domain_parallel.rules.reduction import mean, sum_
from credit.domain_parallel.rules.scatter import decline_out_of_range
from credit.domain_parallel.slab import COMPOSITE, Declined, is_slab, register_rule, rule

REDUCTIONS: dict[str, Any] = {"none": lambda x: x, "mean": mean, "sum": sum_}


def _loss(func: Any) -> Any:
    """The rule of a loss that compares entry by entry."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None or given.get("reduction", "mean") not in (*REDUCTIONS, "batchmean"):
            raise Declined
        reduction = given.pop("reduction", "mean")
        if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
            raise Declined
        each = pointwise(func)(**given, reduction="none")
        if reduction != "batchmean":
            return REDUCTIONS[reduction](each)
        return sum_(each) / each.shape[0]

    return call


for _func in (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.poisson_nll_loss,
    F.soft_margin_loss,
):
    register_rule(_func, _loss(_func))


@rule("F.cross_entropy")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    return _of_classes(
        partial(F.cross_entropy, label_smoothing=label_smoothing), input, target, weight, ignore_index, reduction
    )


@rule("F.nll_loss")
def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Any:
    return _of_classes(F.nll_loss, input, target, weight, ignore_index, reduction)


def _of_classes(loss: Any, x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str) -> Any:
    """Classes are along axis 1, uncut; the mean is by the weights of the targets, without those that are ignored."""
    if not is_slab(x) or x.ndim < 2 or x.cut == 1 or is_slab(weight) or reduction not in REDUCTIONS:
        raise Declined
    numbered = tuple(target.shape) == (x.shape[0], *x.shape[2:])
    if not numbered and target.shape != x.shape:
        raise Declined
    cut = x.cut - (x.cut > 1)
    mine = cut_along(target, cut if numbered else x.cut, x)
    if numbered:
        decline_out_of_range(target, x.shape[1], x, ignored)
    each = x.like(loss(x.local, mine, weight, ignore_index=ignored, reduction="none"), cut)
    if reduction != "mean" or not numbered:
        return REDUCTIONS[reduction](each)
    counted = mine != ignored
    shares = counted.to(x.dtype)
    if weight is not None:
        shares = shares * weight[torch.where(counted, mine, 0)]
    return sum_(each) / AllSum.apply(shares.sum(), x.group)


COMPOSITE[F.gaussian_nll_loss] = run_body(F.gaussian_nll_loss)
