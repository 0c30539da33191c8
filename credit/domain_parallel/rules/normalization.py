"""Norms whose statistics run over the cut axis: those of the whole field, one small message each way.

Local moments are combined by the pairwise formula of Chan, Golub & LeVeque (1983), which does not cancel where a sum
of squares would. In float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.constants import constants
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.reshard import is_dealt_evenly, own
from credit.domain_parallel.rules.axes import axes_of
from credit.domain_parallel.rules.composite import run_body
from credit.domain_parallel.slab import COMPOSITE, Declined, Slab, is_slab, rule
from credit.domain_parallel.torch_private import unsafe_view

Moments = tuple[Tensor, Tensor]


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the moments of all ranks' rows.

    `dims` are reduced, the last axis among them; weight and bias broadcast against x. Without `center`, the mean is
    taken to be zero (RMS norm). Returns y, mean and variance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dims: tuple[int, ...],
        eps: float,
        center: bool,
        counts: tuple[int, ...],
        group: RankGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = _moments(wide, dims, eps, center)
        mean, variance = _combine(mean, variance, counts, group)
        rstd = torch.rsqrt(variance + eps)
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.geometry = dims, center, sum(counts), group, None if bias is None else bias.shape
        ctx.mark_non_differentiable(mean, variance)
        return _affine(wide, scale, shift).to(x.dtype), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dims, center, count, group, bias_shape = ctx.geometry
        kind = x.dtype
        x, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        # With one weight for the whole last axis, sums over it come first and the weight after: two passes less.
        late = weight is not None and weight.shape[-1] == 1
        weighted = grad if weight is None or late else grad * weight
        sums, dots = weighted.sum(-1, keepdim=True), _dot(weighted, x)
        grad_weight = grad_bias = None
        if late:
            grad_weight = _reduce_to((dots - mean * sums) * rstd, weight.shape)
            grad_bias = _reduce_to(sums, bias_shape)
            sums, dots = sums * weight, dots * weight
        elif weight is not None:
            grad_weight = _reduce_to(grad * ((x - mean) * rstd), weight.shape)
            grad_bias = _reduce_to(grad, bias_shape)
        totals = torch.stack([sums.sum(dims, keepdim=True), dots.sum(dims, keepdim=True)])
        total, dot = group.all_reduce(totals)
        spread = (dot - mean * total) * rstd.pow(3) / -count
        offset = -mean * spread - total * rstd / count if center else torch.zeros_like(spread)
        grad_x = _affine(x, spread, offset)
        grad_x.addcmul_(grad, rstd if weight is None else rstd * weight)
        return grad_x.to(kind), grad_weight, grad_bias, None, None, None, None, None


def _moments(x: Tensor, dims: tuple[int, ...], eps: float, center: bool) -> tuple[Tensor | None, Tensor]:
    """(mean, variance) of the local rows over `dims`; without `center`, of squares alone.

    The kernel of group_norm takes moments five times as fast as torch.var_mean on a CPU, which is worth its output.
    """
    if not center:
        return None, _dot(x, x).mean(dims, keepdim=True) / x.shape[-1]
    first = next(d for d in range(x.ndim) if all(e in dims for e in range(d, x.ndim)))
    shape = (*x.shape[:first], *[1] * (x.ndim - first))
    rows, size = prod(x.shape[:first]), prod(x.shape[first:])
    if not x.numel():
        return x.new_zeros(shape).mean(dims, keepdim=True), x.new_zeros(shape).mean(dims, keepdim=True)
    _, mean, rstd = torch.native_group_norm(x.reshape(1, rows, size).contiguous(), None, None, 1, rows, size, rows, eps)
    mean, variance = mean.view(shape), (rstd.view(shape).pow(-2) - eps).clamp_min(0)
    total = mean.mean(dims, keepdim=True)
    return total, (variance + (mean - total).square()).mean(dims, keepdim=True)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, in the one pass of batch_norm's kernel where they do not change along the last axis."""
    if scale.shape[-1] > 1 or shift.shape[-1] > 1 or not x.numel():
        return torch.addcmul(shift, x, scale)
    rows = x.numel() // x.shape[-1]
    scale, shift = (w.expand(*x.shape[:-1], 1).reshape(rows) for w in (scale, shift))
    one, zero = torch.ones_like(scale), torch.zeros_like(scale)
    y = F.batch_norm(x.reshape(1, rows, -1).contiguous(), zero, one, scale, shift, False, 0.0, 0.0)
    # Not as a view: what an autograd function returns could then not be changed in place, as ReLU(inplace=True) does.
    return unsafe_view(y, x.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last axis of a * b, without a tensor of the size of either."""
    return torch.einsum("...i,...i->...", a, b).unsqueeze(-1)


def _reduce_to(x: Tensor, shape: torch.Size | None) -> Tensor | None:
    return None if shape is None else x.sum_to_size(shape)


def _combine(mean: Tensor | None, variance: Tensor, counts: tuple[int, ...], group: RankGroup) -> Moments:
    mine = torch.stack([torch.zeros_like(variance) if mean is None else mean, variance])
    means, variances = group.all_gather(mine).unbind(1)
    total = _average(means, counts)
    return total, _average(variances + (means - total).square(), counts)


def _average(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Over the ranks, the first axis, each of which has so many entries."""
    if len(set(counts)) == 1:
        return x.mean(0)
    return (_shares(counts, x.dtype, x.device).view(-1, *[1] * (x.ndim - 1)) * x).sum(0)


@constants
def _shares(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=dtype, device=device) / sum(counts)


def standardize(
    x: Slab,
    shape: Sequence[int],
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool = True,
) -> tuple[Slab, Tensor, Tensor]:
    """The rows of `x`, viewed as `shape`, standardized over `dims` of that view; moments keep these axes."""
    if not eps >= 0 or not x.is_floating_point():
        raise Declined
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)
    local = x.local.reshape(tuple(shape))
    ours = prod(local.shape[d] for d in dims)
    rows = len(x.partition.range(x.group.rank))
    counts = tuple(ours // max(rows, 1) * len(x.partition.range(rank)) for rank in range(x.partition.parts))
    y, mean, variance = _Standardize.apply(local, weight, bias, dims, eps, center, counts, x.group)
    if x.device.type not in ("cpu", "meta") and torch.is_autocast_enabled(x.device.type):
        y = y.float()  # as autocast does for norms
    return x.like(y.reshape(x.local.shape)), mean, variance


def _refuse_cut(*others: Any) -> None:
    """Weights and statistics that are cut themselves are not for these rules."""
    if any(is_slab(x) for x in others):
        raise Declined


@rule("F.group_norm", "torch.group_norm")
def group_norm(
    input: Slab, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Slab:
    _refuse_cut(weight, bias)
    if input.cut == 0:
        return input.like(F.group_norm(input.local, num_groups, weight, bias, eps))
    if input.cut == 1:
        if not is_dealt_evenly(input, num_groups):
            raise Declined("its groups do not divide over the ranks")
        weight, bias = (None if w is None else own(w, 0, input) for w in (weight, bias))
        return input.like(F.group_norm(input.local, num_groups // input.group.size, weight, bias, eps))
    batch, channels = input.shape[:2]
    each = channels // num_groups
    view = (1, num_groups, each, 1)
    weight, bias = (None if w is None else w.view(view) for w in (weight, bias))
    local = prod(input.local.shape[2:])
    return standardize(input, (batch, num_groups, each, local), (2, 3), weight, bias, eps)[0]


@rule("F.instance_norm")
def instance_norm(
    input: Slab,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Slab:
    _refuse_cut(running_mean, running_var, weight, bias)
    if not use_input_stats or input.cut == 0:
        if (running_mean is not None and use_input_stats) or input.cut == 1:
            raise Declined
        return input.like(
            F.instance_norm(input.local, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        )
    if input.cut == 1:
        raise Declined
    batch, channels = input.shape[:2]
    weight, bias = (None if w is None else w.view(1, channels, 1) for w in (weight, bias))
    shape = (batch, channels, prod(input.local.shape[2:]))
    y, mean, variance = standardize(input, shape, (2,), weight, bias, eps)
    count = prod(input.shape[2:])
    _update(running_mean, running_var, mean.mean((0, 2)), variance.mean((0, 2)), count, momentum)
    return y


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, variance: Tensor, count: int, momentum: float
) -> None:
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)


@rule("F.batch_norm")
def batch_norm(
    input: Slab,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Slab:
    _refuse_cut(running_mean, running_var, weight, bias)
    if input.cut == 1:
        raise Declined("it is a norm of a field whose channels are cut")
    if (running_mean is None) != (running_var is None):
        raise Declined
    if not training:
        return input.like(F.batch_norm(input.local, running_mean, running_var, weight, bias, False, momentum, eps))
    channels, count = input.shape[1], input.numel() // input.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    weight, bias = (None if w is None else w.view(1, channels, 1) for w in (weight, bias))
    shape = (input.local.shape[0], channels, prod(input.local.shape[2:]))
    y, mean, variance = standardize(input, shape, (0, 2), weight, bias, eps)
    _update(running_mean, running_var, mean.flatten(), variance.flatten(), count, momentum)
    return y


def _over_last(input: Slab, normalized_shape: Sequence[int]) -> tuple[int, ...] | None:
    """The trailing axes, if the cut is among them."""
    dims = axes_of(input, range(-len(normalized_shape), 0))
    return dims if input.cut in dims else None


def _rows_of(weight: Tensor | None, input: Slab, dims: tuple[int, ...]) -> Tensor | None:
    return None if weight is None else own(weight, input.cut - dims[0], input).reshape(1, -1)


@rule("F.layer_norm")
def layer_norm(
    input: Slab,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Slab:
    _refuse_cut(weight, bias)
    dims = _over_last(input, normalized_shape)
    if dims is None:
        return input.like(F.layer_norm(input.local, tuple(normalized_shape), weight, bias, eps))
    shape = (prod(input.shape[: dims[0]]), prod(input.local.shape[dims[0] :]))
    return standardize(input, shape, (1,), _rows_of(weight, input, dims), _rows_of(bias, input, dims), eps)[0]


@rule("F.rms_norm")
def rms_norm(
    input: Slab, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Slab:
    _refuse_cut(weight)
    dims = _over_last(input, normalized_shape)
    if dims is None:
        return input.like(F.rms_norm(input.local, tuple(normalized_shape), weight, eps))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    shape = (prod(input.shape[: dims[0]]), prod(input.local.shape[dims[0] :]))
    return standardize(input, shape, (1,), _rows_of(weight, input, dims), None, eps, center=False)[0]


COMPOSITE[F.local_response_norm] = run_body(F.local_response_norm)
