"""Interpolation: each row of the result is a weighted sum of some rows of the field."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.constants import constants
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Taps, make_plan
from credit.domain_parallel.reshard import cut_along, whole
from credit.domain_parallel.rules.convolution import per_axis, with_axis
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule
from credit.domain_parallel.torch_private import no_dispatch_modes


def apply_taps(x: Slab, taps: Taps, others: Any) -> Any:
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
    rows, weights = _tables(taps, tuple(out), first, x.dtype, x.device)
    if rows.shape[1] == 1:
        return x.index_select(dim, rows[:, 0])
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    terms = [x.index_select(dim, rows[:, k]) * weights[:, k].view(shape) for k in range(rows.shape[1])]
    return torch.stack(terms).sum(0) if len(terms) > 2 else terms[0] + terms[1]


@constants
def _tables(
    taps: Taps, out: tuple[int, ...], first: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([taps.rows[o] for o in out], device=device) - first
    return rows, torch.tensor([taps.weights[o] for o in out], dtype=dtype, device=device)


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
    how = _Resizing(
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
    return apply_taps(input, _taps(how), others)


def _floats(scale: Any, axes: int) -> list[float]:
    return [float(s) for s in (scale if isinstance(scale, list | tuple) else [scale] * axes)]


class _Resizing(NamedTuple):
    """Of one axis, of so many spatial ones."""

    length: int
    size: int | None
    scale: float | None
    mode: str
    spatial: int
    axis: int
    options: tuple[tuple[str, Any], ...]
    kind: torch.dtype


@lru_cache(maxsize=256)
def _taps(how: _Resizing) -> Taps:
    """Rows and weights of `F.interpolate` along one axis, measured on unit vectors of the type torch computes in.

    So they follow torch's coordinate conventions exactly.
    """
    with no_dispatch_modes():  # numbers, also where a call is recorded without any
        resized = _resized_units(how)
    columns = resized.reshape(how.length, resized.shape[2], -1)[:, :, 0].T.tolist()
    found = [[row for row, weight in enumerate(column) if weight] for column in columns]
    width = max(map(len, found))
    padded = [rows + rows[-1:] * (width - len(rows)) for rows in found]
    weights = [[*(columns[o][row] for row in rows), *[0.0] * (width - len(rows))] for o, rows in enumerate(found)]
    return Taps(tuple(map(tuple, padded)), tuple(map(tuple, weights)))


def _resized_units(how: _Resizing) -> Tensor:
    length, axis = how.length, how.axis
    # Two columns, as torch's antialiasing is wrong on a field of one (seen with 2.13).
    others: tuple[int, ...] = (2,) * how.spatial
    units = torch.eye(length, dtype=how.kind).view(1, length, *with_axis((1,) * how.spatial, axis, length))
    units = units.expand(1, length, *with_axis(others, axis, length)).contiguous()
    resized = F.interpolate(
        units,
        None if how.size is None else with_axis(others, axis, how.size),
        None if how.scale is None else with_axis((1.0,) * how.spatial, axis, how.scale),
        how.mode,
        **dict(how.options),
    )
    return resized.movedim(axis + 2, 2)


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
