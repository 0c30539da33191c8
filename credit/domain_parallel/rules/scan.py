"""Functions that run along an axis and keep it: cumulative sums, differences, sorting, softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.reshard import other_axis, reshard, whole
from credit.domain_parallel.rules.axes import along, axis_of, back, elsewhere, one_axis
from credit.domain_parallel.rules.reduction import drop_axis
from credit.domain_parallel.slab import Declined, Slab, bound, is_slab, register_rule, rule, torch_functions

for _name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "softmax", "log_softmax", "F.softmin"):
    for _func in torch_functions(_name):
        register_rule(_func, along(_func, one_axis(None)))
for _name in ("diff", "sort", "argsort", "topk", "F.glu"):
    for _func in torch_functions(_name):
        register_rule(_func, along(_func, one_axis(-1)))


@rule("Tensor.unfold")
def unfold(input: Slab, dimension: int, size: int, step: int) -> Any:
    """Windows along an axis: (..., length, ...) to (..., windows, ..., size)."""
    axis = axis_of(input, dimension)
    if axis != input.cut:
        return input.like(input.local.unfold(axis, size, step), input.cut)
    cut = other_axis(input, (axis,))
    if cut is None:
        return whole(input).unfold(axis, size, step)
    there = reshard(input, cut)
    return back(there.local.unfold(axis, size, step), there, axis)


@rule("gradient")
def gradient(input: Slab, *, spacing: Any = None, dim: Any = None, edge_order: int = 1) -> Any:
    """A derivative along each of several axes, one after another."""
    if not is_slab(input):  # its coordinates alone are cut
        raise Declined
    dims = [dim] if isinstance(dim, int) else list(range(input.ndim)) if dim is None else [*dim]
    each = [*spacing] if isinstance(spacing, list | tuple) else [1 if spacing is None else spacing] * len(dims)
    if len(each) != len(dims):
        raise Declined

    def derivative(axis: int, step: Any) -> Any:
        steps = (whole(step),) if isinstance(step, Tensor) else step
        return elsewhere(
            lambda local: torch.gradient(local, spacing=steps, dim=axis, edge_order=edge_order)[0], input, (axis,)
        )

    return [derivative(axis_of(input, d), step) for d, step in zip(dims, each, strict=True)]


def _trapezoid(func: Any) -> Any:
    def call(y: Tensor, x: Any = None, *, dx: Any = 1, dim: int = -1) -> Any:
        if not is_slab(y) or (x is not None and (x.ndim != 1 or is_slab(x))):
            raise Declined
        axis = axis_of(y, dim)
        more = {"dx": dx} if x is None else {"x": x}
        if func is torch.cumulative_trapezoid:
            return elsewhere(lambda local: func(local, **more, dim=axis), y, (axis,))
        kept = elsewhere(lambda local: func(local, **more, dim=axis).unsqueeze(axis), y, (axis,))
        return drop_axis(kept, axis, False)

    return call


for _name in ("trapezoid", "trapz", "cumulative_trapezoid"):
    for _func in torch_functions(_name):
        register_rule(_func, bound(_func, _trapezoid(_func), {}))
