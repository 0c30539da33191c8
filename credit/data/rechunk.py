"""What `credit data rechunk` does: a copy of a store in chunks that domain ranks can read their rows of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from credit.data.opening import AbsentChunk
from credit.data.piece import AXES, Piece, piece_of
from credit.data.times import time_bounds
from credit.errors import DataError
from credit.files import whole

PLACE = ("latitude", "longitude")
PARTS = 16
"""Chunks of latitudes by default: whole ones for a domain of 2, 4, 8 or 16 ranks."""


def rechunk(source: str, path: Path, rows: int | None, times: int, progress: Callable[[int, int], None]) -> None:
    """Write the fields of a store, float32 as they are, into a zarr store (format 3), in memory of `times` states.

    Of a store of one chunk a state every node decodes all; of this one a rank reads its own rows' chunks.

    Args:
        source: a store that `data.path` may name.
        path: of the copy, which must not exist.
        rows: latitudes of a chunk; a sixteenth of all by default.
        times: of a chunk; a batch reads that many at least.

    Raises:
        DataError: if the source cannot be read, or the copy exists.
    """
    if times < 1 or (rows is not None and rows < 1):
        raise DataError(f"a chunk has one row and one time at least, not {rows} and {times}")
    piece = with_gaps(source)
    fields = {name: field.transpose("time", ..., missing_dims="ignore") for name, field in piece_fields(piece).items()}
    sizes = {"latitude": rows or -(-piece.grid.shape[0] // PARTS), "time": times}
    axes = {name: values for name, values in piece.dataset.coords.items() if name in (*AXES, *piece.level_axes)}
    with whole(path) as partial:
        group = create_store(partial, piece, axes, fields, piece.grid.shape, sizes)
        lengths = {name: field.sizes.get("time", 1) for name, field in fields.items()}
        blocks = [(name, begin) for name, length in lengths.items() for begin in range(0, length, times)]
        for done, (name, begin) in enumerate(blocks):
            block = {"time": slice(begin, begin + times)} if "time" in fields[name].dims else {}
            group[name][block.get("time", slice(None))] = read_block(fields[name], block, source)  # type: ignore[index]
            progress(done + 1, len(blocks))


def with_gaps(source: str) -> Piece:
    """A store of which any value may be missing, and is so in a copy."""
    piece = piece_of(source)
    return Piece(source, dict.fromkeys(piece.variables, "mask"), piece.grid.region, monthly=None)


def piece_fields(piece: Piece) -> dict[str, xr.DataArray]:
    """Its fields, latitude and longitude last."""
    every = piece.dataset.data_vars.items()
    return {str(name): one.transpose(..., *PLACE) for name, one in every if {*PLACE} <= {*one.dims}}


def read_block(field: xr.DataArray, places: Mapping[Any, Any], source: str) -> np.ndarray:
    """Part of a field, by places along its dimensions: float32.

    Raises:
        DataError: if a chunk of it was never written or is damaged.
    """
    try:
        return field.isel(places).values.astype(np.float32)
    except AbsentChunk as error:
        raise DataError(f"{source}: the chunk {error.key} was never written") from None
    except Exception as error:
        raise DataError(f"{source}: cannot read {field.name}: {' '.join(str(error).split())[:400]}") from None


def create_store(
    path: Path,
    piece: Piece,
    axes: Mapping[Any, Any],
    fields: Mapping[str, xr.DataArray],
    grid: tuple[int, int],
    chunk: Mapping[str, int],
) -> zarr.Group:
    """An empty zarr store (format 3) of fields like these, float32, with the attributes of a piece.

    Args:
        axes: its coordinates.
        grid: (latitudes, longitudes).
        chunk: sizes of a chunk along some dimensions; along others it is whole.
    """
    empty = xr.Dataset(coords=axes, attrs=piece.dataset.attrs).drop_encoding()
    bounds = time_bounds(piece.dataset) if "time" in axes else None
    if bounds is not None:  # the times of the copy, too, are those of the middles
        empty = empty.assign_coords({bounds.name: bounds.drop_encoding()})
        empty["time"].encoding = {key: piece.dataset["time"].encoding[key] for key in ("units", "calendar")}
    empty.to_zarr(path, consolidated=False, zarr_format=3)
    group = zarr.open_group(path, mode="r+")
    for name, field in fields.items():
        shape = (*field.shape[:-2], *grid)
        dims = [str(dim) for dim in field.dims]
        group.create_array(
            name,
            shape=shape,
            chunks=tuple(min(chunk.get(dim, size), size) for dim, size in zip(dims, shape, strict=True)),
            dtype="float32",
            fill_value=float("nan"),
            dimension_names=dims,
            attributes=piece.attributes(name),
        )
    return group
