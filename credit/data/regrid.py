"""What `credit data regrid` does: a store, or forecasts, on a coarser grid, by area."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from credit.data.grid import Grid
from credit.data.piece import NO_FIELD
from credit.data.rechunk import PLACE, create_store, piece_fields, read_block, with_gaps
from credit.errors import DataError
from credit.files import whole


def globe(latitudes: int, longitudes: int) -> Grid:
    """Regular, from north to south and from 0 east: an odd number of latitudes has the poles, an even one has not."""
    end = 90 if latitudes % 2 else 90 - 90 / latitudes
    return Grid(np.linspace(end, -end, latitudes), np.arange(longitudes) * 360 / longitudes)


class Overlap:
    """First-order conservative regridding (Jones 1999, doi:10.1175/1520-0493(1999)127<2204:FASOCR>2.0.CO;2): a value is
    the mean, by area, of the cells that it covers, of those that are not missing."""

    def __init__(self, source: Grid, target: Grid) -> None:
        bands = [np.sin(np.sort(np.deg2rad(grid.row_edges()))) for grid in (source, target)]
        flipped = [grid.latitude[0] > grid.latitude[-1] for grid in (source, target)]
        rows = _overlaps(bands[0], bands[1])
        self._rows = rows[:: -1 if flipped[1] else 1, :: -1 if flipped[0] else 1]
        width = abs(source.longitude[1] - source.longitude[0])
        begins = np.sort(target.longitude) - 180 / len(target.longitude)
        edges = np.append(begins, begins[0] + 360)
        self._columns = np.zeros((len(target.longitude), len(source.longitude)))
        for column, middle in enumerate(source.longitude):
            for turn in (-360, 0, 360):
                cell = np.array([middle - width / 2, middle + width / 2]) + turn
                self._columns[:, column] += _overlaps(cell, edges)[:, 0]

    def of(self, fields: np.ndarray) -> np.ndarray:
        """(..., latitude, longitude) to float32 on the other grid; missing where all that it covers is."""
        there = np.abs(fields) < NO_FIELD  # false for what is not finite
        total = self._rows @ np.where(there, fields, 0).astype(np.float64) @ self._columns.T
        area = self._rows @ there.astype(np.float64) @ self._columns.T
        whole = self._rows.sum(axis=1)[:, None] * self._columns.sum(axis=1)
        seen = area > 1e-9 * whole
        return np.where(seen, total / np.where(seen, area, 1), np.nan).astype(np.float32)


def _overlaps(cells: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How much of each of `others` each of `cells` covers, from their ascending edges: (other, cell)."""
    upper = np.minimum(others[1:, None], cells[None, 1:])
    return np.maximum(upper - np.maximum(others[:-1, None], cells[None, :-1]), 0)


def regrid(source: str, path: Path, shape: tuple[int, int], progress: Callable[[int, int], None]) -> None:
    """Write the fields of a store of the globe, or of forecasts, on another grid, in memory of one state.

    Args:
        source: a store that `data.path` may name, or a forecast store.
        path: of the zarr store to write, which must not exist.
        shape: (latitudes, longitudes), see `globe`.

    Raises:
        DataError: if the source cannot be read, is of a region or has fewer points than asked for, or the copy exists.
    """
    with whole(path) as partial:
        _regrid(source, partial, shape, progress)


def _regrid(source: str, path: Path, shape: tuple[int, int], progress: Callable[[int, int], None]) -> None:
    piece = with_gaps(source)
    if piece.grid.region:
        raise DataError(f"{source} is of a region, and is not regridded to the globe")
    if shape[0] > piece.grid.shape[0] or shape[1] > piece.grid.shape[1]:
        raise DataError(f"{source} has {piece.grid.shape[0]} x {piece.grid.shape[1]} points, fewer than asked for")
    target = globe(*shape)
    overlap = Overlap(piece.grid, target)
    fields, dataset = piece_fields(piece), piece.dataset
    axes = {name: axis for name, axis in dataset.coords.items() if name not in PLACE and axis.dims == (name,)}
    for name, values in zip(PLACE, (target.latitude, target.longitude), strict=True):
        axes[name] = xr.DataArray(values, dims=name, attrs=dataset[name].attrs)
    one_state = {str(dim): 1 for field in fields.values() for dim in field.dims[:-2]}
    group = create_store(path, piece, axes, fields, shape, one_state)
    states = [(name, place) for name, field in fields.items() for place in np.ndindex(field.shape[:-2])]
    for done, (name, place) in enumerate(states):
        values = read_block(fields[name], dict(zip(fields[name].dims, place, strict=False)), source)
        group[name][place] = overlap.of(values)  # type: ignore[index]
        progress(done + 1, len(states))
