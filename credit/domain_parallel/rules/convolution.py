"""Convolutions: geometry in, plan, exchange, torch's own call without padding on the cut axis, trim."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.halo_conv import Geometry, halo_conv, keeps_rows
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.outcome import convolved_strides
from credit.domain_parallel.partition import Partition, Span, TransposedWindow, Window, make_plan
from credit.domain_parallel.reshard import is_dealt_evenly, other_axis, part, reshard, whole
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def per_axis(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)


def with_axis(values: Sequence[Any], axis: int, value: Any) -> tuple[Any, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def spatial(x: Slab, weight: Tensor) -> tuple[int, int]:
    """(number of spatial axes, which of them is cut), below 0 for batch and channel."""
    axes = weight.ndim - 2
    return axes, x.cut - (x.ndim - axes)


def whole_channels(x: Slab, axes: int) -> Slab:
    """A convolution mixes channels: if these are cut, cut the first spatial axis that is long enough instead."""
    cut = other_axis(x, tuple(range(x.ndim - axes)))
    if cut is None:
        raise Declined
    return reshard(x, cut)


@rule("conv1d", "conv2d", "conv3d")
def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not is_slab(input) or is_slab(weight) or is_slab(bias):
        raise Declined
    axes, axis = spatial(input, weight)
    convolve = CONV[axes]
    if axis < 0 and input.cut == 0 and input.ndim == axes + 2:
        return input.like(convolve(input.local, weight, bias, stride, padding, dilation, groups))
    if axis == -1 and is_dealt_evenly(input, groups):
        target = Partition(weight.shape[0], input.group.size)
        weight = part(weight, 0, target, input.group.rank)
        bias = bias if bias is None else part(bias, 0, target, input.group.rank)
        y = convolve(input.local, weight, bias, stride, padding, dilation, groups // input.group.size)
        return input.like(y, partition=target)
    if axis < 0:
        input = whole_channels(input, axes)
        axis = input.cut - (input.ndim - axes)
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    before, after = pads_of(padding, weight.shape[2:], dilation)
    window = Window(weight.shape[2 + axis], stride[axis], dilation[axis], before[axis], after[axis])
    out = window.out_length(input.shape[input.cut])
    if out < input.group.size:
        return convolve(whole(input), weight, bias, stride, padding, dilation, groups)
    if list(before) == list(after) and keeps_rows(window, input.partition):
        geometry = (stride, list(before), dilation, groups)
        return conv_in_place(input, weight, bias, geometry, window)
    found = fetch(input, window)
    assert found is not None, "there are enough rows"
    x, target = found
    before, after = with_axis(before, axis, 0), with_axis(after, axis, 0)
    if before != after:
        x = F.pad(x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
        before = (0,) * axes
    return input.like(convolve(x, weight, bias, stride, before, dilation, groups), partition=target)


def conv_in_place(x: Slab, weight: Tensor, bias: Tensor | None, geometry: Geometry, window: Window) -> Slab:
    """The convolution where output rows are where input rows are: no copy of the shard."""
    batched = x.local if x.ndim == weight.ndim else x.local.unsqueeze(0)
    cut = x.cut + batched.ndim - x.ndim
    y = halo_conv(batched, weight, bias, geometry, window, x.shape[x.cut], cut, x.group)
    y = x.like(y if x.ndim == weight.ndim else y.squeeze(0))
    y.strides = convolved_strides(tuple(y.shape), x, weight)
    return y


def pads_of(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Rows added before and after each axis; "same" puts the odd one after, as torch does."""
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in totals], [t - t // 2 for t in totals]
    padding = per_axis(padding, len(kernel))
    return padding, padding


def fetch(x: Slab, window: Window, fill: float = 0.0) -> tuple[Tensor, Partition] | None:
    """The rows that `window` reads for this rank's output rows; None if there are fewer of these than ranks."""
    out = window.out_length(x.shape[x.cut])
    if out < x.group.size:
        return None
    target = Partition(out, x.group.size)
    if fill == 0 and x.shared is not None and x.shared[2:] == _changes(x) and window in x.shared[0].windows:
        span, rows, *_ = x.shared
        mine = target.indices(x.group.rank)
        first = mine[0] * window.stride - window.before - span.start(mine)
        return rows.narrow(x.cut, first, (len(mine) - 1) * window.stride + window.reach), target
    plan = make_plan(window, x.partition, x.group.rank, target)
    return exchange(x.local, plan, x.cut, x.group, fill), target


def share_halo(x: Slab, windows: Sequence[Window]) -> None:
    """Fetch at once what all of these windows read; `fetch` then needs no message for any of them.

    Windows must have as many output rows as one another, and zeros past the edges.
    """
    outs = {window.out_length(x.shape[x.cut]) for window in windows}
    if len(outs) == 1 and min(outs) >= x.group.size and all(window.mode == "zeros" for window in windows):
        span = Span(tuple(windows))
        plan = make_plan(span, x.partition, x.group.rank, Partition(outs.pop(), x.group.size))
        x.shared = (span, exchange(x.local, plan, x.cut, x.group), *_changes(x))


def _changes(x: Slab) -> tuple[int, ...]:
    """How often the memory of `x` was changed, where that is counted."""
    return () if x.memory is None else (x.memory.root.changes,)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    if not is_slab(input) or is_slab(weight) or is_slab(bias):
        raise Declined
    axes, axis = spatial(input, weight)
    convolve = CONV_TRANSPOSE[axes]
    if axis < 0 and input.cut == 0 and input.ndim == axes + 2:
        return input.like(convolve(input.local, weight, bias, stride, padding, output_padding, groups, dilation))
    if axis < 0:
        input = whole_channels(input, axes)
        axis = input.cut - (input.ndim - axes)
    stride, padding, extra, dilation = (per_axis(v, axes) for v in (stride, padding, output_padding, dilation))
    window = TransposedWindow(weight.shape[2 + axis], stride[axis], dilation[axis], padding[axis], extra[axis])
    length = input.shape[input.cut]
    out = window.out_length(length)
    if out < input.group.size:
        return convolve(whole(input), weight, bias, stride, padding, extra, groups, dilation)
    target = Partition(out, input.group.size)
    plan = make_plan(window, input.partition, input.group.rank, target)
    x = exchange(input.local, plan, input.cut, input.group)
    before, after = window.crop(plan.out, length)
    # Rows appended below (none reaches them) hold the bias alone, so it can only be added after them.
    late = bias is not None and min(before, after) < 0
    y = convolve(
        x,
        weight,
        None if late else bias,
        stride,
        with_axis(padding, axis, 0),
        with_axis(extra, axis, 0),
        groups,
        dilation,
    )
    if min(before, after) >= 0:
        return input.like(y.narrow(input.cut, before, len(plan.out)), partition=target)
    y = F.pad(y, [0, 0] * (input.ndim - 1 - input.cut) + [-before, -after])
    if late and bias is not None:
        y = y + bias.view(-1, *[1] * axes)
    return input.like(y, partition=target)


@rule("F.unfold")
def unfold(input: Slab, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    """(batch, channels, *space) to (batch, channels * kernel, windows), with batch or channels cut."""
    if input.ndim != 4:
        raise Declined
    cut = input.cut if input.cut < 2 else other_axis(input, tuple(range(2, input.ndim)))
    if cut is None:
        return F.unfold(whole(input), kernel_size, dilation, padding, stride)
    x = reshard(input, cut)
    p = x.partition
    inner = p.inner * prod(per_axis(kernel_size, 2)) if cut == 1 else p.inner
    local = F.unfold(x.local, kernel_size, dilation, padding, stride)
    return x.like(local, cut, Partition(p.rows, p.parts, p.outer, inner))
