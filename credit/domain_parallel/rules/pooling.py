"""Pooling: each row of the result is made of given rows of the field."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.constants import constants
from credit.domain_parallel.partition import Taps, Window
from credit.domain_parallel.reshard import own, whole
from credit.domain_parallel.rules.axes import along, elsewhere
from credit.domain_parallel.rules.convolution import fetch, per_axis, with_axis
from credit.domain_parallel.rules.interpolation import apply_taps
from credit.domain_parallel.rules.reduction import mean
from credit.domain_parallel.slab import Slab, is_slab, register_rule, rule

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def pooled_length(length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Output rows of torch's pooling; with `ceil_mode`, a last window must begin inside the field or before it."""
    room = length + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-room // stride) if ceil_mode else room // stride) + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= length + padding else out


def _pool(function: Any, x: Slab, axes: int, k: Any, s: Any, p: Any, d: Any, ceil_mode: bool, fill: float) -> Any:
    """`function` on the rows this rank's windows read, with all padding made explicit."""
    axis = x.cut - (x.ndim - axes)
    lengths = x.shape[x.ndim - axes :]
    outs = [pooled_length(*geometry, ceil_mode) for geometry in zip(lengths, k, s, p, d, strict=True)]
    # After the last window's end there is nothing to read; with ceil_mode that may lie past the padding.
    afters = [
        (o - 1) * st + di * (ke - 1) + 1 - length - pa
        for o, st, di, ke, length, pa in zip(outs, s, d, k, lengths, p, strict=True)
    ]
    pads = [(0, 0) if i == axis else (p[i], afters[i]) for i in range(axes)]
    flat = [n for pair in pads[::-1] for n in pair]
    if axis < 0:
        return x.like(function(F.pad(x.local, flat, value=fill)))
    found = fetch(x, Window(k[axis], s[axis], d[axis], p[axis], afters[axis]), fill)
    if found is None:
        flat[2 * (axes - 1 - axis) : 2 * (axes - axis)] = [p[axis], afters[axis]]
        return function(F.pad(whole(x), flat, value=fill))
    local, target = found
    local = F.pad(local, flat, value=fill) if any(flat) else local
    return x.like(function(local), partition=target)


def _geometry(axes: int, kernel_size: Any, stride: Any, padding: Any) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of each axis; without a stride, windows stand side by side."""
    k = per_axis(kernel_size, axes)
    return k, per_axis(stride, axes) if stride or isinstance(stride, int) else k, per_axis(padding, axes)


def _max_pool(axes: int) -> Any:
    def call(
        input: Slab,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        k, s, p = _geometry(axes, kernel_size, stride, padding)
        d = per_axis(dilation, axes)
        lowest = -float("inf") if input.is_floating_point() else torch.iinfo(input.dtype).min

        def function(x: Tensor) -> Tensor:
            return MAX_POOL[axes](x, k, s, 0, d)

        return _pool(function, input, axes, k, s, p, d, ceil_mode, lowest)

    return call


def _avg_pool(axes: int) -> Any:
    def without_divisor(
        input: Slab,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> Any:
        return call(input, kernel_size, stride, padding, ceil_mode, count_include_pad)

    def call(
        input: Slab,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        k, s, p = _geometry(axes, kernel_size, stride, padding)

        def function(x: Tensor) -> Tensor:
            return AVG_POOL[axes](x, k, s)

        y = _pool(function, input, axes, k, s, p, [1] * axes, ceil_mode, 0.0)
        if not any(p) and not ceil_mode and divisor_override is None:
            return y
        return _recount(y, input, axes, k, s, p, count_include_pad, divisor_override)

    return without_divisor if axes == 1 else call


@constants
def _factors(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _recount(y: Any, x: Slab, axes: int, k: list, s: list, p: list, include: bool, divisor: int | None) -> Any:
    """Averages over full kernels made into those over what torch counts, axis by axis."""
    for i in range(axes):
        axis = x.ndim - axes + i
        ends = [(o * s[i] - p[i], o * s[i] - p[i] + k[i]) for o in range(y.shape[axis])]
        low, high = (-p[i], x.shape[axis] + p[i]) if include else (0, x.shape[axis])
        counts = [min(end, high) - max(start, low) for start, end in ends]
        wanted = (k[i] / (n if divisor is None else divisor if i == 0 else 1) for n in counts)
        factors = _factors(tuple(wanted), x.device)
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        if is_slab(y):
            mine = own(factors, 0, y) if axis == y.cut else factors
            y = y.like(y.local * mine.to(y.dtype).view(shape))
        else:
            y = y * factors.to(y.dtype).view(shape)
    return y


for _axes in (1, 2, 3):
    rule(f"max_pool{_axes}d")(_max_pool(_axes))
    rule(f"avg_pool{_axes}d")(_avg_pool(_axes))


def _adaptive(axes: int, average: bool) -> Any:
    def call(input: Slab, output_size: Any) -> Any:
        dims = tuple(range(input.ndim - axes, input.ndim))
        if isinstance(output_size, list | tuple) and len(output_size) == 1 < axes:
            output_size = output_size[0]
        size = [output_size] * axes if isinstance(output_size, int) or output_size is None else list(output_size)
        size = [input.shape[d] if n is None else n for d, n in zip(dims, size, strict=True)]
        if average and all(n == 1 for n in size):
            return mean(input, dims, True)
        kind = "avg" if average else "max"
        function = getattr(F, f"adaptive_{kind}_pool{axes}d")
        if not average or input.cut not in dims:
            return elsewhere(lambda local: function(local, size), input, dims)
        axis = input.cut - dims[0]
        taps = _adaptive_taps(input.shape[input.cut], size[axis])
        return apply_taps(input, taps, lambda local: function(local, with_axis(size, axis, local.shape[input.cut])))

    return call


for _axes in (1, 2, 3):
    rule(f"adaptive_avg_pool{_axes}d")(_adaptive(_axes, True))
    rule(f"F.adaptive_max_pool{_axes}d")(_adaptive(_axes, False))


@cache
def _adaptive_taps(length: int, size: int) -> Taps:
    starts = [o * length // size for o in range(size)]
    stops = [-(-(o + 1) * length // size) for o in range(size)]
    width = max(stop - start for start, stop in zip(starts, stops, strict=True))
    rows = [[min(start + k, stop - 1) for k in range(width)] for start, stop in zip(starts, stops, strict=True)]
    weights = [
        [1 / (stop - start) if start + k < stop else 0.0 for k in range(width)]
        for start, stop in zip(starts, stops, strict=True)
    ]
    return Taps(tuple(map(tuple, rows)), tuple(map(tuple, weights)))


for _name, _axes in (("1d", 1), ("2d", 2), ("3d", 3)):
    for _kind in (f"max_pool{_name}_with_indices", f"adaptive_max_pool{_name}_with_indices"):
        _func = getattr(F, _kind)
        register_rule(_func, along(_func, lambda x, given, n=_axes: range(x.ndim - n, x.ndim)))  # type: ignore[misc]
