"""A convolution that adds what the halo contributes, instead of copying the shard to attach the halo to it.

A convolution is linear. It runs on the local rows, with zeros for the halo, while the halo is on its way; then what the
halo rows contribute to the few output rows at the edges is added. The backward does the same in reverse: the halo's
gradient leaves first and travels while the large convolution runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.halo_exchange import (
    add_gradients,
    add_pieces,
    assemble,
    send_gradients,
    send_rows,
    zero_gradients,
)
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.partition import Plan, Window

Geometry = tuple[list[int], list[int], list[int], int]
"""(stride, padding, dilation, groups) of the convolution on local rows, its own zero padding included."""


def keeps_rows(window: Window, plan: Plan) -> bool:
    """True if output rows are where the input rows are, so that the local rows need no shift: stride 1, odd kernel."""
    rows = plan.rows - window.before - window.after
    return (
        window.stride == 1
        and window.mode == "zeros"
        and window.before == window.after
        and 2 * window.before == window.reach - 1
        and rows == plan.shard == len(plan.out)
        and window.before <= plan.shard
    )


def halo_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    plan: Plan,
    dim: int,
    manager: DomainParallelManager,
) -> Tensor:
    """This rank's rows of the convolution of the whole field.

    Args:
        x: this rank's rows, `plan.shard` along `dim`.
        weight, bias: of the convolution.
        geometry: of the convolution on the local rows, padding along `dim` included.
        plan: of a window for which `keeps_rows`.
        dim: the sharded axis.
        manager: gives the domain group.
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), bias if bias is None else bias.to(kind)
    return _HaloConv.apply(x, weight, bias, geometry, plan, dim, manager)


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        plan: Plan,
        dim: int,
        manager: DomainParallelManager,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            messages = send_rows(x, plan, dim, manager)
            y = _conv(x, weight, bias, geometry)
            received = messages.wait()
            strips = []
            for pieces, place, above in _edges(plan, geometry, dim, x):
                strip = _strip(assemble(received, pieces, dim, x), dim, above)
                edge = _conv(strip, weight, None, _without_padding(geometry, dim, x))
                y.narrow(dim, place, edge.shape[dim]).add_(edge)
                strips.append(strip)
        ctx.save_for_backward(x, weight, *strips)
        ctx.geometry = geometry, plan, dim, manager, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *strips = ctx.saved_tensors
        geometry, plan, dim, manager, has_bias = ctx.geometry
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        totals = zero_gradients(plan, x, dim) if wants_x else {}
        halo = _halo(geometry, dim, x)
        grad_weight = None
        for strip, (pieces, place, above) in zip(strips, _edges(plan, geometry, dim, x), strict=True):
            edge = grad.narrow(dim, place, halo).contiguous()
            mask = [wants_x, wants_weight, False]
            of_strip, of_weight, _ = _conv_backward(edge, strip, weight, _without_padding(geometry, dim, x), mask)
            if wants_x:
                start = 0 if above else strip.shape[dim] - halo
                add_pieces(totals, of_strip.narrow(dim, start, halo), pieces, dim)
            if wants_weight:
                grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
        messages = send_gradients(totals, x, plan, dim, manager) if wants_x else None
        mask = [wants_x, wants_weight, has_bias and ctx.needs_input_grad[2]]
        grad_x, of_weight, grad_bias = _conv_backward(grad, x, weight, geometry, mask)
        if wants_weight:
            grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
        if messages is not None:
            add_gradients(grad_x, messages.wait(), plan, dim)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _axis(dim: int, x: Tensor, geometry: Geometry) -> int:
    return dim - (x.ndim - len(geometry[0]))


def _halo(geometry: Geometry, dim: int, x: Tensor) -> int:
    return geometry[1][_axis(dim, x, geometry)]


def _edges(plan: Plan, geometry: Geometry, dim: int, x: Tensor) -> list[tuple[tuple, int, bool]]:
    """(pieces of a halo, first output row it contributes to, whether it is above) for each side that has rows of other ranks."""
    halo = _halo(geometry, dim, x)
    own = next(i for i, piece in enumerate(plan.pieces) if piece.source == plan.rank)
    above, below = plan.pieces[:own], plan.pieces[own + 1 :]
    sides = [(above, 0, True), (below, plan.shard - halo, False)]
    return [side for side in sides if any(piece.source >= 0 for piece in side[0])]


def _strip(halo: Tensor, dim: int, above: bool) -> Tensor:
    """The halo rows, and zeros where the local rows are: what the edge outputs read of other ranks."""
    rows = 2 * halo.shape[dim]
    return F.pad(halo, [0, 0] * (halo.ndim - 1 - dim) + ([0, rows] if above else [rows, 0]))


def _without_padding(geometry: Geometry, dim: int, x: Tensor) -> Geometry:
    stride, padding, dilation, groups = geometry
    axis = _axis(dim, x, geometry)
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
