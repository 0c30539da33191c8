"""Stores as people have them: read to the last bit of a plain xarray read, or refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.data.store import FieldStore, static_fields
from credit.errors import ConfigError, DataError
from tests.stores import conf, dataset

ROWS = range(3, 11)
LEVELS = (500.0, 850.0)


def fields() -> xr.Dataset:
    return dataset(states=6, levels=LEVELS)


def as_zarr(data: xr.Dataset, path: Path, **how: Any) -> Path:
    data.to_zarr(path / "s.zarr", **{"consolidated": False, "zarr_format": 3, **how})
    return path / "s.zarr"


def as_netcdf(data: xr.Dataset, path: Path, **how: Any) -> Path:
    data.to_netcdf(path / "s.nc", **how)
    return path / "s.nc"


def along(data: xr.Dataset, **names: str) -> xr.Dataset:
    """With other names of dimensions, and the 1-D coordinates under their old ones."""
    return xr.Dataset(
        {name: (tuple(names.get(d, d) for d in array.dims), array.values) for name, array in data.data_vars.items()},
        {name: ((names.get(name, name),), data[name].values) for name in map(str, data.coords)},
    )


def gaussian(data: xr.Dataset) -> xr.Dataset:
    return data.assign_coords(latitude=np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(13)[0]))[::-1])


def radians(data: xr.Dataset) -> xr.Dataset:
    for name in ("latitude", "longitude"):
        data = data.assign_coords({name: (name, np.deg2rad(data[name].values), {"units": "radian"})})
    return data


def jittered(data: xr.Dataset) -> xr.Dataset:
    return data.assign_coords(time=data.time + np.array([0, 5, -9, 3, 8, -1]).astype("timedelta64[s]"))


HOURS_SINCE_1900 = {"time": {"units": "hours since 1900-01-01", "dtype": "i8"}}


READ: dict[str, Callable[[xr.Dataset, Path], Path]] = {
    "lat and lon": lambda d, p: as_zarr(d.rename(latitude="lat", longitude="lon"), p),
    "names of CF alone": lambda d, p: as_zarr(
        d.rename(latitude="breite", longitude="laenge").assign_coords(
            breite=("breite", d.latitude.values, {"units": "degrees_north"}),
            laenge=("laenge", d.longitude.values, {"standard_name": "longitude"}),
        ),
        p,
    ),
    "dimensions y and x": lambda d, p: as_netcdf(along(d, latitude="y", longitude="x"), p),
    "another order of dimensions": lambda d, p: as_zarr(d.transpose("longitude", "level", "latitude", "time"), p),
    "valid_time, CDS of today": lambda d, p: as_netcdf(
        d.rename(time="valid_time", level="pressure_level").assign_coords(number=0, expver=("valid_time", ["1"] * 6)), p
    ),
    "valid_time beside a scalar time": lambda d, p: as_netcdf(
        d.rename(time="valid_time").assign_coords(time=np.datetime64("2019-12-31", "ns")), p
    ),
    "valid_time along time, cfgrib": lambda d, p: as_netcdf(
        d.rename(level="isobaricInhPa").assign_coords(valid_time=("time", d.time.values), step=np.timedelta64(0, "ns")),
        p,
    ),
    "an axis of one member": lambda d, p: as_zarr(d.expand_dims(number=[0]), p),
    "an axis of one expver": lambda d, p: as_netcdf(d.expand_dims(expver=["0001"], axis=1), p),
    "levels in float32": lambda d, p: as_zarr(d.assign_coords(level=d.level.astype(np.float32)), p),
    "plev": lambda d, p: as_netcdf(d.rename(level="plev"), p),
    "latitudes to the north": lambda d, p: as_zarr(d.isel(latitude=slice(None, None, -1)), p),
    "longitudes from -180": lambda d, p: as_zarr(d.roll(longitude=8).assign_coords(longitude=d.longitude - 180), p),
    "centres of cells": lambda d, p: as_zarr(d.assign_coords(latitude=np.linspace(84, -84, 13)), p),
    "Gaussian latitudes": lambda d, p: as_zarr(gaussian(d), p),
    "radians": lambda d, p: as_netcdf(radians(d), p),
    "zarr of format 2": lambda d, p: as_zarr(d, p, zarr_format=2),
    "zarr of format 2 in nested chunks": lambda d, p: as_zarr(
        d, p, zarr_format=2, encoding={"a": {"chunks": (1, 5, 16)}, "c": {"chunks": (2, 1, 13, 7)}}
    ),
    "consolidated zarr": lambda d, p: as_zarr(d, p, zarr_format=2, consolidated=True),
    "sharded zarr": lambda d, p: as_zarr(d, p, encoding={"a": {"chunks": (1, 13, 4), "shards": (2, 13, 16)}}),
    "packed netCDF": lambda d, p: as_netcdf(
        d, p, encoding={"a": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": -32767}}
    ),
    "netCDF 3": lambda d, p: as_netcdf(d, p, format="NETCDF3_64BIT"),
    "days in float32": lambda d, p: as_netcdf(
        d, p, encoding={"time": {"units": "days since 2000-01-01", "dtype": "f4"}}
    ),
    "seconds off": lambda d, p: as_netcdf(jittered(d), p),
    "a calendar without leap days": lambda d, p: as_netcdf(of_calendar(d, "noleap"), p),
    "ARCO-ERA5": lambda d, p: as_zarr(
        d.assign_coords(level=d.level.astype(int)), p, zarr_format=2, consolidated=True, encoding=HOURS_SINCE_1900
    ),
    "WeatherBench 2": lambda d, p: as_zarr(
        d.isel(latitude=slice(None, None, -1)).transpose("time", "level", "longitude", "latitude"), p, zarr_format=2
    ),
    "CESM": lambda d, p: as_netcdf(
        of_calendar(d.rename(latitude="lat", longitude="lon", level="lev"), "noleap").assign(
            time_bnds=(("time", "nbnd"), np.arange(12.0).reshape(6, 2)), gw=("lat", np.ones(13))
        ),
        p,
    ),
    "CMIP": lambda d, p: as_netcdf(
        d.rename(latitude="lat", longitude="lon", level="plev")
        .assign_coords(height=2.0)
        .assign(lat_bnds=(("lat", "bnds"), np.zeros((13, 2))), lon_bnds=(("lon", "bnds"), np.zeros((16, 2)))),
        p,
        encoding={"time": {"units": "days since 1850-01-01", "dtype": "f8"}},
    ),
    "MERRA-2": lambda d, p: as_netcdf(
        d.isel(latitude=slice(None, None, -1))
        .roll(longitude=8)
        .assign_coords(longitude=d.longitude - 180)
        .rename(latitude="lat", longitude="lon", level="lev"),
        p,
        unlimited_dims=["time"],
        encoding={"time": {"units": "minutes since 2020-01-01 00:00:00", "dtype": "i4"}},
    ),
    "GFS by cfgrib": lambda d, p: as_netcdf(
        d.rename(level="isobaricInhPa").assign_coords(
            step=np.timedelta64(0, "ns"), heightAboveGround=2.0, surface=0.0, valid_time=("time", d.time.values)
        ),
        p,
    ),
    "compressed netCDF": lambda d, p: as_netcdf(
        d, p, encoding={"a": {"zlib": True, "shuffle": True, "chunksizes": (1, 7, 16)}}
    ),
    "unlimited times": lambda d, p: as_netcdf(d, p, unlimited_dims=["time"]),
    "float64": lambda d, p: as_zarr(d.astype(np.float64), p),
    "packed zarr": lambda d, p: as_zarr(
        d, p, encoding={"a": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": -32767}}
    ),
    "levels from the ground up": lambda d, p: as_zarr(d.isel(level=[1, 0]), p),
    "longitudes of the centres of cells": lambda d, p: as_zarr(d.assign_coords(longitude=d.longitude + 11.25), p),
    "consolidated zarr of format 3": lambda d, p: as_zarr(d, p, consolidated=True),
    "several times a chunk": lambda d, p: as_zarr(d, p, encoding={"a": {"chunks": (4, 13, 16)}}),
    "soil beside pressure levels": lambda d, p: as_netcdf(
        d.assign(stl=(("time", "depth", "latitude", "longitude"), np.ones((6, 4, 13, 16), np.float32))), p
    ),
    "a static along time": lambda d, p: as_zarr(d.assign(orography=d.orography.expand_dims(time=d.time)), p),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_is_what_xarray_reads(tmp_path, kind) -> None:
    path = READ[kind](fields(), tmp_path)
    store = FieldStore(path)
    opened = xr.open_zarr(path, consolidated=False) if path.is_dir() else xr.open_dataset(path)
    channels = store.channels(["a", "c", "b"], [850.0, 500.0])
    read = store.read(channels, [4, 1], ROWS)
    rows, columns = len(ROWS), 16
    axis = next(name for name in ("level", "pressure_level", "lev", "plev", "isobaricInhPa") if name in opened.coords)
    levels = opened[axis].values.tolist()
    for i, channel in enumerate(channels):
        array = opened[channel.variable].squeeze(
            [d for d in opened[channel.variable].dims if d in ("number", "expver")], drop=True
        )
        axes = {len(store.times): "time", 13: "latitude", 16: "longitude", 2: "level"}
        plain = array.reset_coords(drop=True).rename(
            {d: axes[array.sizes[d]] for d in array.dims if d != axes[array.sizes[d]]}
        )
        wanted = plain.transpose("time", ..., "latitude", "longitude").values.astype(np.float32)
        wanted = wanted if channel.level is None else wanted[:, levels.index(channel.level)]
        np.testing.assert_array_equal(read[:, i], wanted[[4, 1], ROWS.start : ROWS.stop], err_msg=channel.name)
        assert read[:, i].shape == (2, rows, columns)
    np.testing.assert_array_equal(store.times, fields().time.values)
    assert bool(store.notes) == (kind in ("seconds off", "a calendar without leap days", "CESM"))
    orography = opened["orography"].squeeze([d for d in opened["orography"].dims if opened["orography"].sizes[d] == 1])
    orography = orography.isel(time=0) if kind == "a static along time" else orography
    if kind in ("another order of dimensions", "WeatherBench 2"):
        orography = orography.transpose()
    np.testing.assert_array_equal(
        static_fields(store, ["orography"], ROWS)[0], orography.values[ROWS.start : ROWS.stop]
    )


def test_two_axes_of_levels_are_told_apart(tmp_path) -> None:
    """As in files of CMIP, where the second has a name that nobody knows, and says what it is."""
    data = fields().assign_coords(level=("level", [500.0, 850.0], {"standard_name": "air_pressure"}))
    both = data.assign(d=(data.c.isel(level=[1]) * 3).rename(level="plev_2"))
    store = FieldStore(as_netcdf(both, tmp_path))
    read = store.read(store.channels(["d", "c"], [850.0]), [4], ROWS)[0]
    np.testing.assert_array_equal(read, [3 * data.c.values[4, 1, 3:11], data.c.values[4, 1, 3:11]])
    with pytest.raises(DataError, match="d has no level 500; stored: 850"):
        store.channels(["c", "d"], [500.0])


def absent(data: xr.Dataset, path: Path, chunk: str, **how: Any) -> Path:
    """A store one chunk of which was never written."""
    path = as_zarr(data, path, encoding={"a": {"chunks": (2, 5, 16)}}, **how)
    (path / "a" / chunk).unlink()
    return path


def curved(data: xr.Dataset, y: str, x: str) -> xr.Dataset:
    grid = np.meshgrid(data.latitude.values, data.longitude.values, indexing="ij")
    moved = along(data.drop_vars(["latitude", "longitude"]), latitude=y, longitude=x)
    return moved.assign_coords(lat=((y, x), grid[0]), lon=((y, x), grid[1]))


def numbers_as_times(data: xr.Dataset) -> xr.Dataset:
    return data.assign_coords(time=np.arange(6))


def of_calendar(data: xr.Dataset, name: str) -> xr.Dataset:
    times = xr.date_range("2020-01-01", periods=6, freq="6h", calendar=name, use_cftime=True)
    return data.assign_coords(time=times)


REFUSED: dict[str, tuple[Callable[[xr.Dataset, Path], Path], str]] = {
    "a band": (
        lambda d, p: as_zarr(d.isel(latitude=slice(3, 10)), p),
        "latitudes must run from pole to pole, and end 45 degrees before one, with steps of 15: a part of the globe",
    ),
    "a hemisphere": (lambda d, p: as_zarr(d.isel(latitude=slice(0, 7)), p), "end 90 degrees before one"),
    "without its poles": (lambda d, p: as_zarr(d.isel(latitude=slice(1, 12)), p), "end 15 degrees before one"),
    "doubled longitudes": (
        lambda d, p: as_zarr(
            xr.concat([d, d.isel(longitude=[0]).assign_coords(longitude=[360.0])], "longitude", data_vars="minimal"), p
        ),
        "longitudes must be regular and close the circle .*: the last repeats the first, leave it out",
    ),
    "wrapped longitudes": (
        lambda d, p: as_zarr(d.assign_coords(longitude=(d.longitude + 180) % 360 - 180), p),
        "longitudes must be regular",
    ),
    "a curved grid": (lambda d, p: as_netcdf(curved(d, "y", "x"), p), "lat has the dimensions .*Regrid the store"),
    "a rotated grid": (
        lambda d, p: as_netcdf(
            curved(d, "rlat", "rlon").assign_coords(rlat=d.latitude.values, rlon=d.longitude.values), p
        ),
        "lat has the dimensions .*Regrid the store",
    ),
    "a model's calendar": (
        lambda d, p: as_netcdf(of_calendar(d, "360_day"), p),
        "its calendar is 360_day, .*convert_",
    ),
    "numbers as times": (lambda d, p: as_zarr(numbers_as_times(d), p), "time holds int64, not dates"),
    "a time twice": (
        lambda d, p: as_zarr(d.isel(time=[0, 1, 1, 2, 3, 4]), p),
        "times must ascend: 2020-01-01T06:00 comes twice, at 2 of 6",
    ),
    "times out of order": (lambda d, p: as_zarr(d.isel(time=[0, 2, 1, 3, 4, 5]), p), "comes out of order, at 2 of 6"),
    "no time axis": (lambda d, p: as_zarr(d.isel(time=0), p), "nothing has a time coordinate along an axis"),
    "ten members": (
        lambda d, p: as_zarr(xr.concat([d, d], "number").assign_coords(number=[0, 1]), p),
        "a has 2 fields along number: choose one",
    ),
    "two expver": (
        lambda d, p: as_netcdf(xr.concat([d, d], "expver").assign_coords(expver=["0001", "0005"]), p),
        "a has 2 fields along expver: choose one",
    ),
    "words as levels": (
        lambda d, p: as_netcdf(d.assign_coords(level=["500 hPa", "850 hPa"]), p),
        "the levels are .*, not numbers",
    ),
    "a chunk that was never written": (
        lambda d, p: absent(d, p, "c/1/1/0"),
        r"a has a chunk that was never written, time 2..3, latitude 5..9, longitude 0..15 \(from 2020-01-01T12:00 on\)",
    ),
    "one of format 2": (
        lambda d, p: absent(d, p, "2.0.0", zarr_format=2),
        "a has a chunk that was never written, time 4",
    ),
    "no longitudes": (lambda d, p: as_zarr(d.drop_vars("longitude"), p), "has no longitude coordinate along an axis"),
    "a level that is not there": (
        lambda d, p: as_zarr(d.assign_coords(level=[500.0, 700.0]), p),
        "c has no level 850; stored: 500, 700",
    ),
    "irregular longitudes": (
        lambda d, p: as_zarr(d.isel(longitude=[*range(10), *range(11, 16)]), p),
        "longitudes must be regular",
    ),
    "latitudes beyond the pole": (
        lambda d, p: as_zarr(d.assign_coords(latitude=np.linspace(96, -96, 13)), p),
        "latitudes must be monotonic within -90..90",
    ),
    "a value that is missing": (
        lambda d, p: as_netcdf(d.assign(a=d.a.where(d.a < 10.9)), p),
        "a is nan at 2020-01-01T00:00, latitude .*data.missing",
    ),
    "an infinite value": (
        lambda d, p: as_zarr(d.assign(c=d.c.where(d.c < 21, np.inf)), p),
        "c at level 850 is inf at 2020-01-01T00:00",
    ),
    "a fill value that is not declared": (
        lambda d, p: as_zarr(d.assign(a=d.a.where(d.a < 10.9, 9.96921e36)), p),
        r"a is 9.96921e\+36 at 2020-01-01T00:00",
    ),
    "no zarr store": (lambda d, p: nothing(p / "s.zarr"), "cannot be opened as a zarr store"),
    "a truncated file": (lambda d, p: cut_short(as_netcdf(d, p)), "cannot be opened as a netCDF file"),
    "words in a file": (lambda d, p: words(p / "s.nc"), "cannot be opened as a netCDF file"),
    "a damaged chunk": (
        lambda d, p: damaged(as_zarr(d, p, encoding={"a": {"chunks": (2, 5, 16)}}) / "a" / "c" / "0" / "0" / "0"),
        "cannot read a",
    ),
}


def nothing(path: Path) -> Path:
    path.mkdir()
    return path


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:2000])
    return path


def words(path: Path) -> Path:
    path.write_text("time,latitude,longitude")
    return path


def damaged(chunk: Path) -> Path:
    chunk.write_bytes(chunk.read_bytes()[:-20] + bytes(20))
    return chunk.parents[4]


def read_all(path: Path) -> None:
    store = FieldStore(path)
    store.read(store.channels(["a", "c"], LEVELS), range(6), range(store.grid.shape[0]))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path, kind) -> None:
    write, said = REFUSED[kind]
    path = write(fields(), tmp_path)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        read_all(path)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_chunks_that_are_read_must_have_been_written(tmp_path) -> None:
    store = FieldStore(absent(fields(), tmp_path, "c/1/1/0"))
    assert store.read(store.channels(["a"]), [2, 3], range(0, 5)).shape == (2, 1, 5, 16)
    assert store.read(store.channels(["a"]), [0, 1, 4], range(0, 13)).shape == (3, 1, 13, 16)


def statistics_of(tmp_path: Path, data: xr.Dataset, **changes: Any) -> None:
    raw = conf(tmp_path / "run", as_zarr(data, tmp_path))
    raw["data"] |= changes
    write_statistics(parse_config(raw))


def test_fields_in_the_wrong_role_are_refused(tmp_path) -> None:
    data = dataset()
    data["still"] = data.a.isel(time=0, drop=True).expand_dims(time=data.time)
    with pytest.raises(DataError, match=r"still does not change in 6 h: give it as one of data.statics"):
        statistics_of(tmp_path, data, variables=["a", "still"])
    store = FieldStore(tmp_path / "s.zarr")
    assert static_fields(store, ["still"], range(13)).shape == (1, 13, 16)
    with pytest.raises(
        DataError, match=r"b changes in time, and is among data.statics: give it as one of data.forcings"
    ):
        static_fields(store, ["b"], range(13))


def test_dates_are_dates_in_utc(tmp_path) -> None:
    raw = conf(tmp_path, tmp_path / "s.zarr")
    raw["data"]["train"] = ["2020-01-01T02:00+02:00", "2020-01-07T00:00Z"]
    assert [str(bound) for bound in parse_config(raw).data.train] == ["2020-01-01 00:00:00", "2020-01-07 00:00:00"]
    raw["data"]["train"] = [20200101, 20200107]
    with pytest.raises(ConfigError, match=r"data.train.0: 20200101 is no date; write it like 2020-01-31"):
        parse_config(raw)


def test_a_chunk_within_a_shard_that_was_never_written_is_refused(tmp_path) -> None:
    data = fields()
    as_zarr(data.drop_vars("a"), tmp_path)
    array = zarr.open_group(tmp_path / "s.zarr").create_array(
        "a", shape=(6, 13, 16), chunks=(1, 5, 16), shards=(6, 15, 16), dtype="f4", dimension_names=data.a.dims
    )
    array[:4] = data.a.values[:4]
    store = FieldStore(tmp_path / "s.zarr")
    channels = store.channels(["a"])
    np.testing.assert_array_equal(store.read(channels, [0, 3], ROWS)[:, 0], data.a.values[[0, 3], 3:11])
    for rows in (range(13), ROWS, range(6, 7)):
        with pytest.raises(DataError, match="a has a chunk within a shard that holds nothing but the fill value, 0"):
            store.read(channels, [3, 4], rows)
    assert (FieldStore(tmp_path / "s.zarr", missing={"a": 0.0}).read(channels, [4], ROWS) == 0).all()


def test_attributes_of_netcdf_are_pythons_own(tmp_path) -> None:
    data = fields()
    data.a.attrs |= {"GRIB_paramId": np.int64(130), "GRIB_range": np.array([1.0, 2.0]), "scale": np.float32(2)}
    store = FieldStore(as_netcdf(data, tmp_path))
    assert json.loads(json.dumps(store.attributes("a"))) == {
        "units": "m s-1",
        "GRIB_paramId": 130,
        "GRIB_range": [1.0, 2.0],
        "scale": 2.0,
    }
