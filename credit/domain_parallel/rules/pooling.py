"""Pooling, interpolation and pixel shuffling: each output row is made of given input rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Taps, Window, make_plan
from credit.domain_parallel.reshard import cut_along, other_axis, own, recut, reshard, whole
from credit.domain_parallel.rules.along import elsewhere
from credit.domain_parallel.rules.reductions import mean
from credit.domain_parallel.rules.windows import fetch, per_axis, with_axis
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule

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


def _recount(y: Any, x: Slab, axes: int, k: list, s: list, p: list, include: bool, divisor: int | None) -> Any:
    """Averages over full kernels made into those over what torch counts, axis by axis."""
    for i in range(axes):
        axis = x.ndim - axes + i
        ends = [(o * s[i] - p[i], o * s[i] - p[i] + k[i]) for o in range(y.shape[axis])]
        low, high = (-p[i], x.shape[axis] + p[i]) if include else (0, x.shape[axis])
        counts = [min(end, high) - max(start, low) for start, end in ends]
        factors = torch.tensor([k[i] / n for n in counts], dtype=torch.float64, device=x.device)
        if divisor is not None:
            factors = torch.full_like(factors, k[i] / (divisor if i == 0 else 1))
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
        return _apply_taps(input, taps, lambda local: function(local, with_axis(size, axis, local.shape[input.cut])))

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


def _apply_taps(x: Slab, taps: Taps, others: Any) -> Any:
    """`others` does the axes that are not cut and keeps this one; then this one by its taps."""
    out, axis = len(taps.rows), x.cut
    if out < x.group.size:
        return _weighted_rows(others(whole(x)), taps, range(out), 0, axis)
    target = Partition(out, x.group.size)
    plan = make_plan(taps, x.partition, x.group.rank, target)
    local = others(exchange(x.local, plan, axis, x.group))
    return x.like(_weighted_rows(local, taps, plan.out, taps.needs(plan.out, 0)[0], axis), partition=target)


def _weighted_rows(x: Tensor, taps: Taps, out: Sequence[int], first: int, dim: int) -> Tensor:
    """Rows `out` of the operator `taps`, from rows of which `first` is the first."""
    rows = torch.tensor([taps.rows[o] for o in out], device=x.device) - first
    weights = torch.tensor([taps.weights[o] for o in out], dtype=x.dtype, device=x.device)
    if rows.shape[1] == 1:
        return x.index_select(dim, rows[:, 0])
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    terms = [x.index_select(dim, rows[:, k]) * weights[:, k].view(shape) for k in range(rows.shape[1])]
    return torch.stack(terms).sum(0) if len(terms) > 2 else terms[0] + terms[1]


@rule("F.interpolate")
def interpolate(
    input: Slab,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Separable: the other axes by torch (this one at scale 1), then this one by its taps."""
    spatial, axis = input.ndim - 2, input.cut - 2
    options: dict[str, Any] = {"align_corners": align_corners, "recompute_scale_factor": recompute_scale_factor}
    if antialias:
        options["antialias"] = True
    if axis < 0:
        return input.like(F.interpolate(input.local, size, scale_factor, mode, **options))
    sizes = None if size is None else per_axis(size, spatial)
    scales = None if scale_factor is None else _floats(scale_factor, spatial)
    taps = _taps(
        input.shape[input.cut],
        None if sizes is None else sizes[axis],
        None if scales is None else scales[axis],
        mode,
        spatial,
        axis,
        tuple(sorted(options.items())),
        torch.float64 if input.dtype == torch.float64 else torch.float32,
    )
    same_rows = (sizes is not None and sizes[axis] == input.shape[input.cut]) or (
        scales is not None and scales[axis] == 1
    )

    def others(local: Tensor) -> Tensor:
        return F.interpolate(
            local,
            None if sizes is None else with_axis(sizes, axis, local.shape[input.cut]),
            None if scales is None else with_axis(scales, axis, 1.0),
            mode,
            **options,
        )

    if same_rows:
        return input.like(others(input.local))
    return _apply_taps(input, taps, others)


def _floats(scale: Any, axes: int) -> list[float]:
    return [float(s) for s in (scale if isinstance(scale, list | tuple) else [scale] * axes)]


@lru_cache(maxsize=256)
def _taps(
    length: int,
    size: int | None,
    scale: float | None,
    mode: str,
    spatial: int,
    axis: int,
    options: tuple,
    kind: torch.dtype,
) -> Taps:
    """Rows and weights of `F.interpolate` along one axis, measured on unit vectors of the type torch computes in.

    So they follow torch's coordinate conventions exactly.
    """
    # Two columns, as torch's antialiasing is wrong on a field of one (seen with 2.13).
    others: tuple[int, ...] = (2,) * spatial
    units = torch.eye(length, dtype=kind).view(1, length, *with_axis((1,) * spatial, axis, length))
    units = units.expand(1, length, *with_axis(others, axis, length)).contiguous()
    resized = F.interpolate(
        units,
        None if size is None else with_axis(others, axis, size),
        None if scale is None else with_axis((1.0,) * spatial, axis, scale),
        mode,
        **dict(options),
    )
    resized = resized.movedim(axis + 2, 2)
    columns = resized.reshape(length, resized.shape[2], -1)[:, :, 0].T
    found = [column.nonzero().flatten().tolist() for column in columns]
    width = max(map(len, found))
    padded = [rows + rows[-1:] * (width - len(rows)) for rows in found]
    weights = [[*columns[o][rows].tolist(), *[0.0] * (width - len(rows))] for o, rows in enumerate(found)]
    return Taps(tuple(map(tuple, padded)), tuple(map(tuple, weights)))


@rule("pixel_shuffle")
def pixel_shuffle(input: Slab, upscale_factor: int) -> Slab:
    if input.cut == input.ndim - 3:
        raise Declined
    local = F.pixel_shuffle(input.local, upscale_factor)
    if input.cut < input.ndim - 3:
        return input.like(local)
    p = input.partition
    return input.like(local, partition=Partition(p.rows, p.parts, p.outer, p.inner * upscale_factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(input: Slab, downscale_factor: int) -> Any:
    if input.cut == input.ndim - 3:
        raise Declined
    if input.cut < input.ndim - 3:
        return input.like(F.pixel_unshuffle(input.local, downscale_factor))
    rows = input.shape[input.cut] // downscale_factor
    if rows < input.group.size or rows * downscale_factor != input.shape[input.cut]:
        return F.pixel_unshuffle(whole(input), downscale_factor)
    x = recut(input, Partition(rows, input.group.size, 1, downscale_factor))
    return x.like(F.pixel_unshuffle(x.local, downscale_factor), partition=Partition(rows, input.group.size))


@rule("channel_shuffle")
def channel_shuffle(input: Slab, groups: int) -> Slab:
    if input.cut == 1:
        raise Declined
    return input.like(torch.channel_shuffle(input.local, groups))


@rule("F.grid_sample")
def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Any:
    """Any input row may be read: the field is made whole, the output is cut as the grid is."""
    if not is_slab(grid) or grid.cut == grid.ndim - 1:
        raise Declined
    options = (mode, padding_mode, align_corners)
    if grid.cut == 0:
        return grid.like(F.grid_sample(cut_along(input, 0, grid), grid.local, *options), 0)
    return grid.like(F.grid_sample(whole(input), grid.local, *options), grid.cut + 1)


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
