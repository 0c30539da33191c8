"""A convolution that adds what the halo contributes, instead of copying the shard to attach the halo to it.

A convolution is linear. It runs on the local rows, with zeros for the halo, while the halo is on its way; then what the
halo rows contribute to the few output rows at the edges is added. The backward does the same in reverse: the halo's
gradient leaves first and travels while the large convolution runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.halo_exchange import (
    add_gradients,
    add_pieces,
    assemble,
    send_gradients,
    send_rows,
    zero_gradients,
)
from credit.domain_parallel.partition import Halo, Partition, Plan, Window, make_plan

Geometry = tuple[list[int], list[int], list[int], int]
"""(stride, padding, dilation, groups) of the convolution on local rows, its own zero padding included."""


def keeps_rows(window: Window, partition: Partition) -> bool:
    """True if output rows are where the input rows are, so that the local rows need no shift: stride 1, odd kernel."""
    return (
        window.stride == 1
        and window.before == window.after
        and 2 * window.before == window.reach - 1
        and partition.is_plain
        and window.before <= min(partition.sizes)
    )


def halo_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    window: Window,
    length: int,
    dim: int,
    group: RankGroup,
) -> Tensor:
    """This rank's rows of the convolution of the whole field, padded past the edges as `window.mode` says.

    Args:
        x: this rank's rows along `dim`.
        weight, bias: of the convolution.
        geometry: of the convolution on the local rows; along `dim` it pads with `window.before` zeros.
        window: one for which `keeps_rows`.
        length: of the whole field along `dim`.
        dim: the sharded axis.
        group: the ranks that share the field.
    """
    if torch.is_autocast_enabled(_autocast_type(x)):
        kind = torch.get_autocast_dtype(_autocast_type(x))
        x, weight, bias = x.to(kind), weight.to(kind), bias if bias is None else bias.to(kind)
    plan = make_plan(Halo(window), Partition(length, group.size), group.rank)
    group.allow_messages()
    return _HaloConv.apply(x, weight, bias, geometry, window, plan, dim, group)


def _autocast_type(x: Tensor) -> str:
    """The device type whose autocast applies; tensors without values have none of their own, and follow the CPU's."""
    return "cpu" if x.device.type == "meta" else x.device.type


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        window: Window,
        plan: Plan,
        dim: int,
        group: RankGroup,
    ) -> Tensor:
        without_padding = _without_padding(geometry, dim, x)
        with torch.autocast(_autocast_type(x), enabled=False):
            messages = send_rows(x, plan, dim, group)
            y = _conv(x, weight, bias, geometry)
            halo = assemble({plan.rank: x, **messages.wait()}, plan.pieces, dim, x)
            strips = []
            for edge in _edges(window, plan):
                strip = F.pad(halo.narrow(dim, edge.first, window.before), [0, 0] * (x.ndim - 1 - dim) + edge.zeros)
                change = _conv(strip, weight, None, without_padding)
                y.narrow(dim, edge.out, window.before).add_(change)
                strips.append(strip)
        ctx.save_for_backward(x, weight, *strips)
        ctx.geometry = geometry, without_padding, window, plan, dim, group, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *strips = ctx.saved_tensors
        geometry, without_padding, window, plan, dim, group, has_bias = ctx.geometry
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        of_halo = x.new_zeros([*x.shape[:dim], window.before + window.after, *x.shape[dim + 1 :]])
        weights = []
        for strip, edge in zip(strips, _edges(window, plan), strict=True):
            rows = grad.narrow(dim, edge.out, window.before).contiguous()
            of_strip, of_weight, _ = _conv_backward(
                rows, strip, weight, without_padding, [wants_x, wants_weight, False]
            )
            if wants_x:
                part = of_strip.narrow(dim, edge.zeros[0], window.before)
                of_halo.narrow(dim, edge.first, window.before).copy_(part)
            weights.append(of_weight)
        messages = None
        if wants_x:
            totals = zero_gradients(plan, x, dim)
            add_pieces(totals, of_halo, plan.pieces, dim)
            messages = send_gradients(totals, x, plan, dim, group)
        mask = [wants_x, wants_weight, has_bias and ctx.needs_input_grad[2]]
        grad_x, grad_weight, grad_bias = _conv_backward(grad, x, weight, geometry, mask)
        for of_weight in weights if wants_weight else ():
            grad_weight.add_(of_weight)
        if messages is not None:
            add_gradients(grad_x, messages.wait(), plan, dim)
            add_pieces({plan.rank: grad_x}, of_halo, plan.pieces, dim)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


@dataclass(frozen=True)
class _Edge:
    """One side of the shard: its rows in the halo, the zeros that stand for the shard, its first output row."""

    first: int
    zeros: list[int]
    out: int


def _edges(window: Window, plan: Plan) -> list[_Edge]:
    """The sides whose halo is not all zeros."""
    width = window.before
    at_pole = window.mode == "zeros"
    edges = []
    if width and not (at_pole and plan.out[0] == 0):
        edges.append(_Edge(0, [0, 2 * width], 0))
    if width and not (at_pole and plan.out[-1] == plan.length - 1):
        edges.append(_Edge(width, [2 * width, 0], plan.shard - width))
    return edges


def _without_padding(geometry: Geometry, dim: int, x: Tensor) -> Geometry:
    stride, padding, dilation, groups = geometry
    axis = dim - (x.ndim - len(stride))
    return stride, [*padding[:axis], 0, *padding[axis + 1 :]], dilation, groups


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, list(mask)
    )
