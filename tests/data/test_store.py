"""Stores: what is read, how much of it, and what is refused."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from credit.cli import main
from credit.data.grid import Grid, cos_zenith
from credit.data.prepare import SAMPLES
from credit.data.store import FieldStore, static_fields
from credit.domain_parallel.partition import Partition
from credit.errors import DataError
from tests.stores import dataset, write_zarr

STEP = np.timedelta64(6, "h")


def test_rows_and_levels_are_those_of_the_file(tmp_path) -> None:
    data = dataset(levels=(850.0, 500.0))
    store = FieldStore(write_zarr(tmp_path / "s.zarr", data))
    channels = store.channels(["c", "a"], [500.0, 850.0])
    assert [channel.name for channel in channels] == ["c_500", "c_850", "a"]
    read = store.read(channels, [7, 3], range(4, 9))
    expected = np.stack([data.c.sel(level=500).values, data.c.sel(level=850).values, data.a.values], axis=1)[
        [7, 3], :, 4:9
    ]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(static_fields(store, ["orography"], range(2, 5))[0], data.orography.values[2:5])


def bytes_read() -> int:
    """Bytes this process has read through system calls since it started, from the kernel's own count."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("domain", [2, 3, 4])
@pytest.mark.parametrize("kind", ["zarr", "netcdf"])
def test_bytes_read_from_the_store_fall_as_one_over_domain(tmp_path, kind, domain) -> None:
    """All times of 181 x 360 ERA5: a rank reads its rows' chunks, at most one chunk row more at each end."""
    rows_per_chunk = {"zarr": 4, "netcdf": 23}[kind]
    path = SAMPLES["era5-sample"]
    if kind == "zarr":
        source = xr.open_dataset(path)[["t2m", "msl"]].drop_encoding().astype("float32")
        path = write_zarr(tmp_path / "era5.zarr", source, rows_per_chunk)

    def count(rows: range) -> int:
        store = FieldStore(path)
        channels = store.channels(["t2m", "msl"])
        before = bytes_read()
        for time in range(len(store.times)):
            store.read(channels, [time], rows)
        return bytes_read() - before

    whole = count(range(181))
    chunks = -(-181 // rows_per_chunk)
    shares = []
    for rank in range(domain):
        rows = Partition(181, domain).range(rank)
        touched = (rows.stop - 1) // rows_per_chunk - rows.start // rows_per_chunk + 1
        shares.append(count(rows) / whole)
        # The zarr is not compressed, so its chunks are equal; rows of the netCDF compress unequally well.
        assert shares[-1] == pytest.approx(touched / chunks, rel={"zarr": 0.01, "netcdf": 0.15}[kind])
    assert sum(shares) < 1 + domain * rows_per_chunk / 181


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("latitude"), "has no latitude coordinate"),
        (lambda d: d.isel(longitude=slice(0, 8)), "longitudes must be regular and close the circle"),
        (
            lambda d: d.assign_coords(latitude=np.r_[90, 91, np.linspace(70, -90, 11)]),
            "latitudes must be monotonic within -90..90",
        ),
        (
            lambda d: d.isel(time=[1, 0, 2]),
            "times must ascend: 2020-01-01T00:00 comes out of order, at 1 of 3, after 2020-01-01T06:00",
        ),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, change, message) -> None:
    path = write_zarr(tmp_path / "s.zarr", change(dataset(states=4)))
    with pytest.raises(DataError, match=message) as caught:
        FieldStore(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=re.escape(f"there is no {tmp_path / 'none.zarr'}")):
        FieldStore(tmp_path / "none.zarr")
    (tmp_path / "broken.nc").write_bytes(b"not a netCDF file")
    with pytest.raises(DataError, match=r"broken\.nc cannot be opened as a netCDF file"):
        FieldStore(tmp_path / "broken.nc")
    store = FieldStore(write_zarr(tmp_path / "s.zarr", dataset(levels=(850.0,))))
    with pytest.raises(DataError, match="has no variable 'orograhpy'; did you mean 'orography'"):
        store.channels(["orograhpy"])
    with pytest.raises(DataError, match="c has no level 500; stored: 850"):
        store.channels(["c"], [500.0])


def test_the_first_value_that_is_not_finite_is_located(tmp_path) -> None:
    data = dataset(states=5)
    data.b[3, 6, 4] = np.nan
    store = FieldStore(write_zarr(tmp_path / "s.zarr", data))
    store.read(store.channels(["a", "b"]), [3], range(0, 6))
    with pytest.raises(DataError, match="b is nan at 2020-01-01T18:00, latitude 0, longitude 90"):
        store.read(store.channels(["a", "b"]), [2, 3], range(5, 10))


def test_gaps_are_refused_or_skipped(tmp_path) -> None:
    store = FieldStore(write_zarr(tmp_path / "s.zarr", dataset(states=12).drop_isel(time=5)))
    period = (datetime(2020, 1, 1), datetime(2020, 1, 3, 12))
    with pytest.raises(DataError, match="2020-01-02T00:00 is not followed by a time 6 h later"):
        store.starts(period, STEP, 1, "refuse")
    assert store.starts(period, STEP, 1, "skip").tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert store.starts(period, STEP, 3, "skip").tolist() == [0, 1, 5]
    with pytest.raises(
        DataError, match=r"no sample of 1 step\(s\) of 6 h between 2021.* the store runs from 2020-01-01"
    ):
        store.starts((datetime(2021, 1, 1), datetime(2021, 2, 1)), STEP, 1, "refuse")


@pytest.mark.parametrize("latitudes", [np.linspace(90, -90, 181), np.linspace(-88.75, 88.75, 72)])
def test_latitude_weights_are_areas_of_the_sphere(latitudes) -> None:
    weights = Grid(latitudes, np.arange(0, 360, 2.0)).latitude_weights()
    assert weights.mean() == pytest.approx(1, abs=1e-12)
    assert (weights > 0).all()
    assert (weights * np.sin(np.deg2rad(latitudes)) ** 2).mean() == pytest.approx(1 / 3, rel=1e-3)


def test_the_sun_stands_over_the_tropic_at_noon_of_the_solstice() -> None:
    latitude, longitude = np.arange(90.0, -91, -1), np.arange(0.0, 360, 1)
    cosine = cos_zenith(np.array(["2026-06-21T12", "2026-12-21T18"], "datetime64[ns]"), latitude, longitude)
    places = [np.unravel_index(field.argmax(), field.shape) for field in cosine]
    assert [(latitude[row], longitude[column]) for row, column in places] == [(23, 0), (-23, 270)]
    assert cosine.min() == 0


def test_a_time_that_is_not_in_the_store_is_never_taken_for_its_neighbour(tmp_path) -> None:
    store = FieldStore(write_zarr(tmp_path / "s.zarr", dataset(states=4)))
    assert store.indices(store.times[[2, 0]]) == [2, 0]
    for late in (1, 24 * 30):
        with pytest.raises(DataError, match="has no time 2020-01-"):
            store.indices(store.times[:1] + np.timedelta64(late, "h"))


def test_of_a_copy_in_chunks_of_latitudes_a_rank_reads_its_part(tmp_path, capsys) -> None:
    """A store of one chunk a state, as they come, is decoded whole by each of four ranks."""
    data = dataset(states=6, grid=(64, 128), levels=(500.0, 850.0))
    turned = data.transpose("latitude", "level", "longitude", "time")
    turned.to_netcdf(tmp_path / "turned.nc")
    assert main(["data", "rechunk", str(tmp_path / "turned.nc"), str(tmp_path / "turned.zarr"), "--times", "4"]) == 0
    with xr.open_zarr(tmp_path / "turned.zarr", consolidated=False) as copy:
        xr.testing.assert_identical(copy.load(), data)
    data.c[2, 1, 40, 5] = np.nan
    data.to_zarr(tmp_path / "s.zarr", consolidated=False, encoding={"b": {"chunks": (1, 64, 128), "compressors": None}})
    command = ["data", "rechunk", str(tmp_path / "s.zarr"), str(tmp_path / "copy.zarr"), "--times", "2"]
    assert main(command) == 0
    assert "copy.zarr: " in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith("unfinished")] == []
    with xr.open_zarr(tmp_path / "copy.zarr", consolidated=False) as copy:
        xr.testing.assert_identical(copy.load(), data)
        assert copy.b.encoding["chunks"] == (2, 4, 128)

    def count(path: Path, rows: range) -> int:
        store = FieldStore(path)
        store.read(store.channels(["b"]), [0], range(1))
        before = bytes_read()
        store.read(store.channels(["b"]), [2, 3, 4, 5], rows)
        return bytes_read() - before

    whole, part = (count(tmp_path / name, range(16, 32)) for name in ("s.zarr", "copy.zarr"))
    assert whole >= 4 * 64 * 128 * 4
    assert part <= whole / 4 * 1.01
    assert main(command) == 2
    assert "copy.zarr exists: remove it" in capsys.readouterr().err
