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
    taken to be zero (RMS norm). Returns y, mean and variance + eps.

    Where an accelerator waits for the host, what counts is how few operators there are, not how small they are: the
    kernels of torch's own norms are put to other uses, each for what would take several.
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
        mean, spread = _combine(*_moments(wide, dims, eps, center), counts, group)
        rstd = spread.rsqrt()
        if weight is not None and _is_late(weight):
            scale = rstd * weight
            shift = -mean * scale if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
            y = _standardized(wide, None, None, scale, shift)
        else:
            scale, y = rstd, _standardized(wide, mean, spread)
            if weight is not None:
                y = y * weight if bias is None else torch.addcmul(bias, y, weight)
        ctx.save_for_backward(x, weight, mean, spread, rstd, scale)
        ctx.geometry = dims, center, sum(counts), group, None if bias is None else bias.shape
        ctx.mark_non_differentiable(mean, spread)
        ctx.set_materialize_grads(False)
        return y.to(x.dtype), mean, spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, spread, rstd, scale = ctx.saved_tensors
        dims, center, count, group, bias_shape = ctx.geometry
        kind = x.dtype
        x, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        late = _is_late(weight)
        weighted = grad if weight is None or late else grad * weight
        dots, sums = _sums(weighted, x, mean, rstd)
        grad_weight = grad_bias = None
        if late:
            grad_weight, grad_bias = _reduce_to(dots, weight.shape), _reduce_to(sums, bias_shape)
        elif weight is not None:
            grad_weight = _reduce_to(grad * ((x - mean) * rstd), weight.shape)
            grad_bias = _reduce_to(grad, bias_shape)
        totals = torch.stack([dots, sums])
        totals = totals * weight if late else totals
        if any(totals.shape[d + 1] > 1 for d in dims):
            totals = totals.sum([d + 1 for d in dims], keepdim=True)
        totals = group.all_reduce(totals)
        slope, offset = torch.addcmul(_zero(rstd.dtype, rstd.device), totals, rstd, value=-1 / max(count, 1))
        grad_x = _standardized(x, mean, spread, slope, offset if center else torch.zeros_like(slope))
        return grad_x.addcmul_(weighted, scale).to(kind), grad_weight, grad_bias, None, None, None, None, None


def _is_late(weight: Tensor | None) -> bool:
    """There is one weight for all of the last axis: sums over it come first and the weight after."""
    return weight is not None and weight.shape[-1] == 1


def _moments(x: Tensor, dims: tuple[int, ...], eps: float, center: bool) -> Moments:
    """(mean, variance + eps) of the local rows over `dims`; without `center`, zero and that of squares.

    The kernel of group_norm takes moments five times as fast as torch.var_mean on a CPU, which is worth its output.
    """
    if not center:
        squares = _dot(x, x).mean(dims, keepdim=True) / x.shape[-1] + eps
        return torch.zeros_like(squares), squares
    first = next(d for d in range(x.ndim) if all(e in dims for e in range(d, x.ndim)))
    shape = (*x.shape[:first], *[1] * (x.ndim - first))
    rows, size = prod(x.shape[:first]), prod(x.shape[first:])
    if not x.numel():
        return x.new_zeros(shape).mean(dims, keepdim=True), x.new_zeros(shape).mean(dims, keepdim=True)
    _, mean, rstd = torch.native_group_norm(x.reshape(1, rows, size).contiguous(), None, None, 1, rows, size, rows, eps)
    mean, spread = mean.view(shape), rstd.view(shape).pow(-2)
    if all(shape[d] == 1 for d in dims):
        return mean, spread
    total = mean.mean(dims, keepdim=True)
    return total, (spread + (mean - total).square()).mean(dims, keepdim=True)


def _standardized(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance) * weight + bias, in the one pass of batch_norm's kernel: none of these changes along
    the last axis."""
    given = [w for w in (mean, weight) if w is not None]
    if not x.numel():
        return x.clone()
    axes = max((d + 1 for w in given for d in range(w.ndim) if w.shape[d] > 1), default=0)
    shape, rows = (*x.shape[:axes], *[1] * (x.ndim - axes)), prod(x.shape[:axes])
    mean, variance, weight, bias = (
        None if w is None else w.expand(shape).reshape(rows) for w in (mean, variance, weight, bias)
    )
    if mean is None or variance is None:
        mean, variance = _zero(x.dtype, x.device, rows), _one(x.dtype, x.device, rows)
    y = F.batch_norm(x.reshape(1, rows, -1).contiguous(), mean, variance, weight, bias, False, 0.0, 0.0)
    # Not as a view: what an autograd function returns could then not be changed in place, as ReLU(inplace=True) does.
    return unsafe_view(y, x.shape)


def _sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Moments:
    """Over the last axis: of grad * (x - mean) * rstd, and of grad. The kernel of group_norm's backward takes both."""
    shape, rows = (*x.shape[:-1], 1), prod(x.shape[:-1])
    if not x.numel():
        return x.new_zeros(shape), x.new_zeros(shape)
    axes = max((d + 1 for d in range(mean.ndim) if mean.shape[d] > 1), default=0)
    groups = prod(x.shape[:axes])
    mean, rstd = (w.expand(*x.shape[:axes], *w.shape[axes:]).reshape(1, groups) for w in (mean, rstd))
    grad, x = (w.reshape(1, rows, -1).contiguous() for w in (grad, x))
    _, dots, sums = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, x.new_empty(rows), 1, rows, x.shape[-1], groups, [False, True, True]
    )
    return dots.view(shape), sums.view(shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last axis of a * b; without a tensor of the size of either, unless products are rounded."""
    if torch.get_float32_matmul_precision() != "highest":  # statistics are no place for TF32
        return (a * b).sum(-1, keepdim=True)
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return torch.einsum("...i,...i->...", a, b).unsqueeze(-1)


def _reduce_to(x: Tensor, shape: torch.Size | None) -> Tensor | None:
    return None if shape is None else x.sum_to_size(shape)


def _combine(mean: Tensor, variance: Tensor, counts: tuple[int, ...], group: RankGroup) -> Moments:
    """The moments of all ranks' rows, of which each has so many."""
    everyone = group.all_gather(torch.stack([mean, variance]))
    means = everyone.select(1, 0)
    if len(set(counts)) == 1:
        total, spread = everyone.mean(0), means.var(0, correction=0)
    else:
        shares = _shares(counts, mean.dtype, mean.device).view(-1, *[1] * mean.ndim)
        total = (everyone * shares.unsqueeze(1)).sum(0)
        spread = ((means - total[0]).square() * shares).sum(0)
    mean, variance = total.unbind()
    return mean, variance.add_(spread)


@constants
def _zero(dtype: torch.dtype, device: torch.device, number: int = 1) -> Tensor:
    return torch.zeros(number, dtype=dtype, device=device)


@constants
def _one(dtype: torch.dtype, device: torch.device, number: int) -> Tensor:
    return torch.ones(number, dtype=dtype, device=device)


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
    """The rows of `x`, viewed as `shape`, standardized over `dims` of that view. Mean and variance + eps keep
    these axes."""
    if not eps >= 0 or not x.is_floating_point():
        raise Declined
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)
    local = x.local.reshape(tuple(shape))
    ours = prod(local.shape[d] for d in dims)
    rows = len(x.partition.range(x.group.rank))
    counts = tuple(ours // max(rows, 1) * len(x.partition.range(rank)) for rank in range(x.partition.parts))
    y, mean, spread = _Standardize.apply(local, weight, bias, dims, eps, center, counts, x.group)
    if x.device.type not in ("cpu", "meta") and torch.is_autocast_enabled(x.device.type):
        y = y.float()  # as autocast does for norms
    return x.like(y.reshape(x.local.shape)), mean, spread


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
    y, mean, spread = standardize(input, shape, (2,), weight, bias, eps)
    count = prod(input.shape[2:])
    if running_mean is not None:
        _update(running_mean, running_var, mean.mean((0, 2)), spread.mean((0, 2)) - eps, count, momentum)
    return y


def _update(
    running_mean: Tensor, running_var: Tensor | None, mean: Tensor, variance: Tensor, count: int, momentum: float
) -> None:
    assert running_var is not None, "torch has both or none"
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        variance = variance.clamp_min(0) * (count / (count - 1))
        running_var.lerp_(variance.to(running_var.dtype), momentum)


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
    y, mean, spread = standardize(input, shape, (0, 2), weight, bias, eps)
    if running_mean is not None:
        _update(running_mean, running_var, mean.flatten(), spread.flatten() - eps, count, momentum)
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
