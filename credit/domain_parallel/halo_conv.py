"""A convolution that adds what the halo contributes, instead of copying the shard to attach the halo to it.

A convolution is linear. It runs on the local rows, with zeros for the halo, while the halo is on its way; then what the
halo rows contribute to the few output rows at the edges is added. The backward does the same in reverse: the halo's
gradient leaves first and travels while the large convolution runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.halo_exchange import add_rows, assemble, send_gradients, send_rows
from credit.domain_parallel.partition import Halo, Partition, Plan, Window, make_plan

Geometry = tuple[list[int], list[int], list[int], int]
"""(stride, padding, dilation, groups) of the convolution on local rows, its own zero padding included."""


def keeps_rows(window: Window, partition: Partition) -> bool:
    """True if output rows are where the input rows are, so that the local rows need no shift: stride 1, odd kernel of
    more than one row."""
    return (
        window.stride == 1
        and window.before == window.after
        and 2 * window.before == window.reach - 1
        and partition.is_plain
        and 0 < window.before <= min(partition.sizes)
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
            change = _conv(halo, weight, None, without_padding)
            for rows, first in _edges(window, plan):
                y.narrow(dim, rows, window.before).add_(change.narrow(dim, first, window.before))
        ctx.save_for_backward(x, weight, halo)
        ctx.geometry = geometry, without_padding, window, plan, dim, group, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, halo = ctx.saved_tensors
        geometry, without_padding, window, plan, dim, group, has_bias = ctx.geometry
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        edges = [grad.narrow(dim, first, window.before) for first in (0, plan.shard - window.before)]
        of_halo, of_weight, _ = _conv_backward(
            torch.cat(edges, dim), halo, weight, without_padding, [wants_x, wants_weight, False]
        )
        messages = send_gradients(of_halo, plan, dim, group) if wants_x else None
        mask = [wants_x, wants_weight, has_bias and ctx.needs_input_grad[2]]
        grad_x, grad_weight, grad_bias = _conv_backward(grad, x, weight, geometry, mask)
        if wants_weight:
            grad_weight.add_(of_weight)
        if messages is not None:
            add_rows(grad_x, {plan.rank: of_halo, **messages.wait()}, plan.gradient.runs, dim)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _edges(window: Window, plan: Plan) -> list[tuple[int, int]]:
    """The sides whose halo is not all zeros: (first row of the output, first row of what the halo contributes)."""
    at_pole = window.mode == "zeros"
    top, bottom = (0, 0), (plan.shard - window.before, window.before)
    north = [] if at_pole and plan.out[0] == 0 else [top]
    return north if at_pole and plan.out[-1] == plan.length - 1 else [*north, bottom]


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
