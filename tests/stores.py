"""Small stores of smooth random fields for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from credit.data.climatology import ForcingClimatology
from credit.data.statistics import Statistics, origin_of
from credit.data.store import FieldStore

GRID = (13, 16)
START = np.datetime64("2020-01-01", "ns")


def dataset(states: int = 40, grid: tuple[int, int] = GRID, levels: tuple[float, ...] = ()) -> xr.Dataset:
    """Variables `a`, `b` and, on `levels`, `c`; static `orography`; 6-hourly. Waves that move east."""
    latitude = np.linspace(90, -90, grid[0])
    longitude = np.arange(grid[1]) * 360 / grid[1]
    time = START + np.arange(states) * np.timedelta64(6, "h")
    phase = np.deg2rad(longitude)[None, None, :] - 0.3 * np.arange(states)[:, None, None]
    envelope = np.cos(np.deg2rad(latitude))[None, :, None]
    a = (10 + envelope * np.sin(2 * phase)).astype(np.float32)
    b = (270 + 20 * envelope + envelope * np.cos(3 * phase)).astype(np.float32)
    variables: dict[str, Any] = {
        "a": (("time", "latitude", "longitude"), a, {"units": "m s-1"}),
        "b": (("time", "latitude", "longitude"), b, {"units": "K"}),
        "orography": (("latitude", "longitude"), (1 + a[0] ** 2).astype(np.float32)),
    }
    coords: dict[str, Any] = {"time": time, "latitude": latitude, "longitude": longitude}
    if levels:
        coords["level"] = list(levels)
        factor = np.arange(1, len(levels) + 1, dtype=np.float32)[None, :, None, None]
        variables["c"] = (("time", "level", "latitude", "longitude"), a[:, None] * factor, {"units": "m"})
    return xr.Dataset(variables, coords)


def write_zarr(path: Path, data: xr.Dataset, rows_per_chunk: int = 4) -> Path:
    """One time and `rows_per_chunk` latitudes a chunk, not compressed."""
    rows = {"latitude": rows_per_chunk, "time": 1}
    encoding = {
        name: {"chunks": tuple(rows.get(str(dim), data.sizes[dim]) for dim in array.dims), "compressors": None}
        for name, array in data.data_vars.items()
    }
    data.to_zarr(path, mode="w", consolidated=False, encoding=encoding)
    return path


def write_empty(path: Path, data: Any, grid: tuple[int, int]) -> None:
    """A store of what a config's `data` wants, 6-hourly from 1979 to 2020, with no chunk of it; and statistics."""
    levels, times = np.array(data.levels), 61_368
    group = zarr.open_group(path, mode="w")
    axes = {
        "time": (6 * np.arange(times), {"units": "hours since 1979-01-01", "calendar": "proleptic_gregorian"}),
        "level": (levels, {}),
        "latitude": (np.linspace(90, -90, grid[0]), {}),
        "longitude": (np.arange(grid[1]) * 360 / grid[1], {}),
    }
    for name, (values, attributes) in axes.items():
        group.create_array(name, data=values, dimension_names=[name], attributes=attributes)
    upper = [name for name in data.variables if not name.startswith(("2m_", "10m_", "mean_sea"))]
    for name in [*data.variables, *data.given]:
        dims = ("time",) * (name in data.variables) + ("level",) * (name in upper) + ("latitude", "longitude")
        shape = tuple(len(axes[dim][0]) for dim in dims)
        chunks = (1, *shape[1:]) if dims[0] == "time" else shape
        group.create_array(name, shape=shape, chunks=chunks, dtype="float32", dimension_names=dims)
    made = FieldStore(path)
    names = [channel.name for channel in made.channels(data.predicted, data.levels)]
    ones = dict.fromkeys([*names, *data.given], 1.0)
    climatology = xr.DataArray(np.zeros((1, 1, 1), np.float32), dims=("c", "y", "x"))
    increments, origin = dict.fromkeys(names, 1.0), origin_of(data, made.grid)
    none = xr.DataArray(np.zeros((0,) * 5, np.float32), dims=("forcing", "month", "hour", "latitude", "longitude"))
    Statistics(ones, ones, increments, climatology, ForcingClimatology(none), {}, origin).save(path.with_suffix(".nc"))


def conf(run: Path, store: Path, **trainer: Any) -> dict[str, Any]:
    """A config for `dataset()`: 23 training samples, 5 steps an epoch."""
    return {
        "run": str(run),
        "data": {
            "path": str(store),
            "variables": ["a", "b"],
            "statics": ["orography", "sin_latitude"],
            "forcings": ["cos_zenith"],
            "step": "6h",
            "train": ["2020-01-01", "2020-01-07"],
            "valid": ["2020-01-07", "2020-01-08 12:00"],
            "test": ["2020-01-08 12:00", "2020-01-11"],
        },
        "model": {"name": "unet", "width": 4, "levels": 1, "groups": 2},
        "trainer": {"epochs": 2, "batch_size": 4, **trainer},
        "forecast": {"lead": "24h"},
    }


def with_forcing(data: xr.Dataset) -> xr.Dataset:
    """`warmth`, which depends on the hour of the day and the place alone."""
    hour = ((data.time - data.time.dt.floor("D")) / np.timedelta64(1, "h")).astype(np.float32)
    field = hour * data.orography + data.latitude / 90
    return data.assign(warmth=field.transpose("time", "latitude", "longitude").astype(np.float32))
