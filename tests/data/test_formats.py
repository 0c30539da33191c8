"""Stores of other formats, and on a server of objects: the values of a plain read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import eccodes
import icechunk
import kerchunk.df
import kerchunk.hdf
import numpy as np
import pytest
import xarray as xr
from moto.server import ThreadedMotoServer

from credit.config import parse_config
from credit.data.describe import describe
from credit.data.prepare import write_statistics
from credit.data.rechunk import rechunk
from credit.data.store import FieldStore
from credit.errors import DataError
from tests.stores import conf, dataset
from tests.training.runs import curve

ROWS = range(3, 11)


def message(values: np.ndarray, hour: int, name: str, kind: str, level: int, **more: Any) -> bytes:
    """One GRIB2 message of (13, 16) values on the globe, of an analysis unless `more` says otherwise."""
    handle = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
    keys = {
        **{"Ni": 16, "Nj": 13, "iDirectionIncrementInDegrees": 22.5, "jDirectionIncrementInDegrees": 15},
        **{"latitudeOfFirstGridPointInDegrees": 90, "latitudeOfLastGridPointInDegrees": -90},
        **{"longitudeOfFirstGridPointInDegrees": 0, "longitudeOfLastGridPointInDegrees": 337.5},
        **{"dataDate": 20200101 + hour // 24, "dataTime": hour % 24 * 100, "bitsPerValue": 24},
        **more,
        **{"typeOfLevel": kind, "level": level, "shortName": name},
    }
    for key, value in keys.items():
        eccodes.codes_set(handle, key, value)
    eccodes.codes_set_values(handle, values.astype(float).ravel())
    encoded = eccodes.codes_get_message(handle)
    eccodes.codes_release(handle)
    return encoded


def as_grib(data: xr.Dataset, path: Path) -> Path:
    """`t` on two levels and at the surface, and `sp`."""
    with path.open("wb") as stream:
        for number in range(data.sizes["time"]):
            state = data.isel(time=number)
            for level in state.level.values:
                stream.write(message(state.c.sel(level=level).values, 6 * number, "t", "isobaricInhPa", int(level)))
            stream.write(message(state.b.values, 6 * number, "t", "surface", 0))
            stream.write(message(state.a.values, 6 * number, "sp", "surface", 0))
    return path


def test_grib_is_read_and_names_on_other_levels_are_told_apart(tmp_path) -> None:
    data = dataset(states=5, levels=(500.0, 850.0))
    one = as_grib(data, tmp_path / "all.grib2")
    for number in range(5):
        as_grib(data.isel(time=[number]).assign_coords(time=data.time[[0]]), tmp_path / f"hour{number}.grib2")
    store = FieldStore(one)
    np.testing.assert_array_equal(store.times, data.time.values)
    channels = store.channels(["t", "t_surface", "sp"], [850.0, 500.0])
    read = store.read(channels, [4, 1], ROWS)
    wanted = [data.c.sel(level=850), data.c.sel(level=500), data.b, data.a]
    for column, field in enumerate(wanted):  # 24 bits a value
        np.testing.assert_allclose(read[:, column], field.values[[4, 1], 3:11], rtol=2e-6)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".grib2"] == []
    alone = FieldStore(tmp_path / "hour3.grib2")
    assert alone.times.tolist() == data.time.values[:1].tolist()
    np.testing.assert_allclose(alone.read(alone.channels(["sp"]), [0], ROWS)[0, 0], data.a.values[3, 3:11], rtol=2e-6)
    assert "t_surface" in describe([str(one)])
    (tmp_path / "broken.grib2").write_bytes(one.read_bytes()[:100])
    with pytest.raises(DataError, match=r"broken.grib2 cannot be opened as a GRIB file|broken.grib2 has no latitude"):
        FieldStore(tmp_path / "broken.grib2")


def test_grib_fields_of_one_name_are_all_there(tmp_path) -> None:
    """What the library has no name for is `unknown`; some on another kind of level, and one a mean over time."""
    mean = {"productDefinitionTemplateNumber": 8, "stepType": "avg"}
    kinds = [("isobaricInhPa", 500, {}), ("surface", 0, {}), ("surface", 0, mean)]
    with (tmp_path / "f.grib2").open("wb") as stream:
        for value, (kind, level, more) in enumerate(kinds, start=1):
            known = eccodes.codes_new_from_message(message(np.full((13, 16), value), 0, "t", kind, level, **more))
            for key in ("parameterCategory", "parameterNumber"):
                eccodes.codes_set(known, key, 200)
            stream.write(eccodes.codes_get_message(known))
            eccodes.codes_release(known)
    store = FieldStore(tmp_path / "f.grib2")
    for value, name in enumerate(("unknown", "unknown_surface", "unknown_surface_avg"), start=1):
        read = store.read(store.channels([name], [500.0]), [0], range(13))
        np.testing.assert_allclose(read, value, rtol=1e-5, err_msg=name)


def of_all_levels(path: Path) -> None:
    """Of two times: variables on other sets of pressure levels, near the ground, in the ground and at the surface."""
    kinds = [
        *(("t", "isobaricInhPa", level, {}) for level in (500, 850)),
        *(("u", "isobaricInhPa", level, {}) for level in (850, 500, 300)),
        ("q", "isobaricInhPa", 700, {}),
        *(("soilw", "depthBelowLandLayer", level, {"centre": "kwbc"}) for level in (0, 1)),
        *(("t", "heightAboveGround", level, {"centre": "kwbc"}) for level in (80, 100)),
        ("2t", "heightAboveGround", 2, {}),
        ("sp", "surface", 0, {}),
    ]
    values = np.random.default_rng(0).normal(size=(2, len(kinds), 13, 16))
    with path.open("wb") as stream:
        for number, fields in enumerate(values):
            for field, (name, kind, level, more) in zip(fields, kinds, strict=True):
                stream.write(message(field, 6 * number, name, kind, level, **more))


def test_variables_of_a_grib_file_have_levels_of_their_own(tmp_path) -> None:
    """As cfgrib reads each alone; and in a copy."""
    path = tmp_path / "all.grib2"
    of_all_levels(path)
    store = FieldStore(path)

    def alone(name: str, kind: str, level: int | None = None) -> np.ndarray:
        how = {"indexpath": "", "filter_by_keys": {"shortName": name, "typeOfLevel": kind}}
        (field,) = xr.open_dataset(path, engine="cfgrib", backend_kwargs=how).data_vars.values()
        return (field if level is None else field.sel({kind: level})).values[[1, 0]]

    wanted = {
        **{f"{name}_{level}": (name, "isobaricInhPa", level) for name in "tu" for level in (500, 850)},
        "q": ("q", "isobaricInhPa"),
        "soilw_depthBelowLandLayer_1": ("soilw", "depthBelowLandLayer", 1),
        "t_heightAboveGround_80": ("t", "heightAboveGround", 80),
        "t2m": ("2t", "heightAboveGround"),
        "sp": ("sp", "surface"),
    }
    flat = [name for name in wanted if not name.endswith(("_500", "_850"))]
    channels = store.channels([*"tu", *flat], [500.0, 850.0])
    assert [channel.name for channel in channels] == [*wanted]
    for channel, field in zip(channels, np.moveaxis(store.read(channels, [1, 0], range(13)), 1, 0), strict=True):
        np.testing.assert_array_equal(field, alone(*wanted[channel.name]), err_msg=channel.name)
    for variable, level in (("t", 300.0), ("u", 700.0)):
        with pytest.raises(DataError, match=f"all.grib2: {variable} has no level {level:g}; stored: 850, 500"):
            store.channels([variable], [level])
    assert "levels: [500, 850]" in describe([str(path)])
    rechunk(str(path), tmp_path / "copy.zarr", 13, 2, lambda done, total: None)
    copy = FieldStore(tmp_path / "copy.zarr")
    upper = [*channels, *store.channels(["u"], [300.0])]
    assert copy.channels(["u"], [300.0]) == upper[-1:]
    np.testing.assert_array_equal(copy.read(upper, [1], ROWS), store.read(upper, [1], ROWS))


def test_an_icechunk_repository_is_read(tmp_path) -> None:
    data = dataset(states=5)
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    session = repository.writable_session("main")
    data.to_zarr(session.store, consolidated=False, zarr_format=3)
    session.commit("all of it")
    store = FieldStore(tmp_path / "repo")
    np.testing.assert_array_equal(store.read(store.channels(["a"]), [4], ROWS)[0, 0], data.a.values[4, 3:11])


def referred(data: xr.Dataset, folder: Path) -> list[Path]:
    """References to a netCDF 4 file with all that such files have: as JSON and as parquet."""
    encoding = {
        "a": {"zlib": True, "shuffle": True, "chunksizes": (2, 7, 16)},
        "b": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 270.0, "_FillValue": -32767},
    }
    data.to_netcdf(folder / "s.nc", encoding=encoding)
    found = kerchunk.hdf.SingleHdf5ToZarr(str(folder / "s.nc"), inline_threshold=0).translate()
    (folder / "s.json").write_text(json.dumps(found))
    kerchunk.df.refs_to_dataframe(found, str(folder / "s.parq"))
    return [folder / "s.json", folder / "s.parq"]


def test_references_of_kerchunk_are_read_as_the_file_that_they_are_to(tmp_path) -> None:
    data = dataset(states=5, levels=(500.0, 850.0))
    plain = tmp_path / "s.nc"
    for path in referred(data, tmp_path):
        store, wanted = FieldStore(path), FieldStore(plain)
        np.testing.assert_array_equal(store.times, data.time.values)
        channels = store.channels(["b", "c", "a"], [850.0, 500.0])
        with xr.open_dataset(plain) as opened:
            packed = opened.b.values[[4, 1], 3:11].astype(np.float32)
        read = store.read(channels, [4, 1], ROWS)
        np.testing.assert_array_equal(read[:, 0], packed)
        np.testing.assert_array_equal(read, wanted.read(channels, [4, 1], ROWS))
        assert store.attributes("a")["units"] == "m s-1"
        lenient = FieldStore(path, missing={"a": 0.0})
        plain.rename(tmp_path / "elsewhere.nc")
        with pytest.raises(DataError, match=r"s.(json|parq): cannot read a: .*s.nc"):
            lenient.read(lenient.channels(["a"]), [0], ROWS)
        with pytest.raises(DataError, match=r"s.(json|parq) cannot be opened as a kerchunk reference: .*s.nc"):
            FieldStore(path)
        (tmp_path / "elsewhere.nc").rename(plain)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config.json cannot be opened as a kerchunk reference|has no latitude"):
        FieldStore(tmp_path / "config.json")


def test_a_run_on_references_is_that_on_the_file(tmp_path) -> None:
    """Workers open them again."""
    json_path, _ = referred(dataset(), tmp_path)
    losses = []
    for path, workers in ((tmp_path / "s.nc", 0), (json_path, 1)):
        raw = conf(tmp_path / f"run{len(losses)}", path, dtype="float64", epochs=1)
        raw["data"]["workers"] = workers
        write_statistics(parse_config(raw))
        losses.append(curve(raw)[0])
    assert losses[0] == losses[1]


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """A bucket on a server of S3, and credentials for it in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="weather")
    yield "weather"
    server.stop()


def test_a_run_on_s3_is_that_on_the_disk(tmp_path, bucket) -> None:
    chunks = {"a": {"chunks": (4, 13, 16)}}
    dataset().to_zarr(tmp_path / "s.zarr", consolidated=True, zarr_format=2, encoding=chunks)
    client = boto3.client("s3")
    for path in (tmp_path / "s.zarr").rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"era5/{path.relative_to(tmp_path)}")
    losses = []
    for place in (str(tmp_path / "s.zarr"), f"s3://{bucket}/era5/s.zarr"):
        raw = conf(tmp_path / f"run{len(losses)}", tmp_path, dtype="float64", epochs=1)
        raw["data"]["path"] = place
        write_statistics(parse_config(raw))
        losses.append(curve(raw)[0])
    assert losses[0] == losses[1]
    client.delete_object(Bucket=bucket, Key="era5/s.zarr/a/3.0.0")
    with pytest.raises(DataError, match=r"s3://weather/era5/s.zarr: a has a chunk that was never written, time 12..15"):
        write_statistics(parse_config(raw))
    with pytest.raises(DataError, match=r"s3://weather/nothing.zarr cannot be opened as a zarr store"):
        FieldStore(f"s3://{bucket}/nothing.zarr")
