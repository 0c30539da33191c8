"""A data set in several stores: by year, by variable; in a zip, on a server of objects, over http."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from credit.config import Source, parse_config
from credit.data.dataset import StepDataset
from credit.data.piece import same_units
from credit.data.prepare import write_statistics
from credit.data.sampler import Draw
from credit.data.store import FieldStore, static_fields
from credit.errors import ConfigError, DataError
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve, fields_of

ROWS = range(2, 9)


def split(data: xr.Dataset, folder: Path) -> list[str]:
    """`a` in three files by time, `b` in a zarr store, `orography` in a file without time."""
    paths = [folder / f"a_{part}.nc" for part in range(3)]
    for part, path in zip((slice(0, 7), slice(7, 8), slice(8, None)), paths, strict=True):
        data[["a"]].isel(time=part).to_netcdf(path)
    data[["b"]].to_zarr(folder / "b.zarr", consolidated=False)
    data[["orography"]].to_netcdf(folder / "still.nc")
    return [str(folder / "a_*.nc"), str(folder / "b.zarr"), str(folder / "still.nc")]


def test_fields_of_several_stores_are_those_of_one(tmp_path) -> None:
    data = dataset(states=20)
    one, several = FieldStore(write_zarr(tmp_path / "s.zarr", data)), FieldStore(split(data, tmp_path))
    np.testing.assert_array_equal(several.times, one.times)
    times = [19, 0, 6, 7, 8, 3]
    channels = one.channels(["b", "a"])
    assert several.channels(["b", "a"]) == channels
    np.testing.assert_array_equal(several.read(channels, times, ROWS), one.read(channels, times, ROWS))
    still = [static_fields(store, ["orography"], ROWS) for store in (one, several)]
    np.testing.assert_array_equal(*still)


def test_a_run_on_several_stores_is_that_on_one(tmp_path) -> None:
    data = dataset()
    losses = []
    for paths in ([str(write_zarr(tmp_path / "s.zarr", data))], split(data, tmp_path)):
        raw = conf(tmp_path / f"run{len(losses)}", tmp_path / "s.zarr", dtype="float64")
        raw["data"]["path"] = paths
        write_statistics(parse_config(raw))
        losses.append(curve(raw)[0])
    assert losses[0] == losses[1]


def test_times_are_those_at_which_all_is_there(tmp_path) -> None:
    data = dataset(states=12)
    data[["a"]].isel(time=slice(0, 9)).to_netcdf(tmp_path / "a.nc")
    data[["b"]].isel(time=slice(3, 12)).to_netcdf(tmp_path / "b.nc")
    paths = [str(tmp_path / "a.nc"), str(tmp_path / "b.nc")]
    np.testing.assert_array_equal(FieldStore(paths).times, data.time.values[3:9])
    alone = FieldStore(paths, ["b"])
    np.testing.assert_array_equal(alone.times, data.time.values[3:12])
    np.testing.assert_array_equal(alone.read(alone.channels(["b"]), [0, 8], ROWS)[:, 0], data.b.values[[3, 11], 2:9])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.isel(time=slice(0, 3)), "a at 2020-01-01T00:00 is in .*one.nc and in .*two.nc: leave one of them"),
        (lambda d: d[["b"]].isel(longitude=slice(None, None, 2)), r"two.nc has another grid than .*one.nc: .*8 values"),
        (
            lambda d: (
                d[["b"]].assign_coords(time=d.time + np.timedelta64(9, "D")).assign(b=d.b.assign_attrs(units="degC"))
            ),
            "b is in K in .*one.nc and in degC in .*two.nc: convert one of them",
        ),
        (lambda d: d.isel(time=0, drop=True)[["a"]], "a is along time in .*one.nc and not in .*two.nc"),
    ],
)
def test_stores_that_do_not_fit_together_are_refused(tmp_path, change, said) -> None:
    data = dataset(states=6)
    data.to_netcdf(tmp_path / "one.nc")
    change(data).to_netcdf(tmp_path / "two.nc")
    with pytest.raises(DataError, match=said):
        FieldStore([str(tmp_path / "one.nc"), str(tmp_path / "two.nc")])
    with pytest.raises(DataError, match=r"nothing matches .*none\*"):
        FieldStore(str(tmp_path / "none*.nc"))


def test_a_zip_is_read_as_a_store(tmp_path) -> None:
    import zarr

    data = dataset(states=5)
    with zarr.storage.ZipStore(tmp_path / "s.zip", mode="w") as packed:
        data.to_zarr(packed, consolidated=False)
    store = FieldStore(tmp_path / "s.zip")
    np.testing.assert_array_equal(store.read(store.channels(["a"]), [4], ROWS)[0, 0], data.a.values[4, 2:9])


class Moody(http.server.SimpleHTTPRequestHandler):
    """Fails now and then, as object stores do; counts what it was asked for."""

    asked: list[str] = []
    failing = 0

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.failing and len(self.asked) % self.failing == 0:
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    """The address of what is in `tmp_path`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Moody, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Moody.asked, Moody.failing = [], 0
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_samples_over_http_are_those_of_the_disk_though_requests_fail(tmp_path, served) -> None:
    """One request in twenty is answered with 503."""
    path = tmp_path / "s.zarr"
    dataset().to_zarr(path, zarr_format=2, consolidated=True, encoding={"a": {"chunks": (1, 13, 16)}})
    raw = conf(tmp_path / "run", path)
    write_statistics(parse_config(raw))
    raw["data"]["stats"] = str(tmp_path / "run" / "stats.nc")
    draws = [Draw(sample, 1.0) for sample in range(12)]
    wanted = StepDataset(fields_of(raw), "train").__getitems__(draws)
    raw["data"]["path"] = f"{served}/s.zarr"
    Moody.failing = 20
    found = StepDataset(fields_of(raw), "train").__getitems__(draws)
    assert len(Moody.asked) > 20
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_is_not_on_the_server_is_said(served) -> None:
    with pytest.raises(DataError, match=r"http://.*/none.zarr cannot be opened as a zarr store: "):
        FieldStore(f"{served}/none.zarr")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("m s**-1", "m s-1", True),
        ("m/s", "m s^-1", True),
        ("kg kg**-1", "kg/kg", True),
        ("kg m-2", "kg/m2", True),
        ("kg m**-2 s**-1", "kg m-2 s-1", True),
        ("K", "Kelvin", True),
        ("", "K", True),
        ("K", "degC", False),
        ("m", "mm", False),
        ("m s-1", "m s-2", False),
        ("Pa", "hPa", False),
    ],
)
def test_units_are_told_apart_by_what_they_say(one, other, same) -> None:
    assert same_units(one, other) is same
    assert same_units(other, one) is same


def on_levels(levels: tuple[float, ...], day: int) -> xr.Dataset:
    data = dataset(states=4, levels=levels)[["c"]]
    return data.assign_coords(time=data.time + np.timedelta64(day, "D"))


def test_levels_are_those_of_every_store(tmp_path) -> None:
    paths = [str(tmp_path / name) for name in ("one.nc", "two.nc")]
    on_levels((500.0, 850.0), 0).to_netcdf(paths[0])
    on_levels((850.0, 500.0), 1).to_netcdf(paths[1])
    store = FieldStore(paths)
    read = store.read(store.channels(["c"], [500.0, 850.0]), [0, 4], ROWS)
    first, second = (xr.open_dataset(path)["c"].sel(level=[500.0, 850.0]).values[0, :, 2:9] for path in paths)
    np.testing.assert_array_equal(read, [first, second])
    on_levels((300.0, 850.0), 2).to_netcdf(tmp_path / "three.nc")
    with pytest.raises(DataError, match=r"three.nc: c has no level 500; stored: 300, 850"):
        FieldStore([*paths, str(tmp_path / "three.nc")]).channels(["c"], [500.0, 850.0])
    flat = on_levels((500.0,), 3).isel(level=0, drop=True)
    flat.to_netcdf(tmp_path / "flat.nc")
    with pytest.raises(DataError, match=r"c has no levels in .*flat.nc, and elsewhere it has"):
        FieldStore([*paths, str(tmp_path / "flat.nc")]).channels(["c"], [500.0])


def test_a_field_is_never_taken_from_another_time_than_its_own(tmp_path) -> None:
    """Of a store whose times are those of another variable."""
    data = dataset(states=12)
    data[["a"]].to_netcdf(tmp_path / "a.nc")
    data[["b"]].isel(time=[0, 4]).to_netcdf(tmp_path / "b.nc")
    store = FieldStore([str(tmp_path / "a.nc"), str(tmp_path / "b.nc")], ["a"])
    times = data.time.values
    assert [store.has("b", times[[i]]) for i in (0, 1, 4, 11)] == [True, False, True, False]
    assert (store.read_at(store.channels(["b"]), times[[4, 0]], ROWS)[:, 0] == data.b.values[[4, 0], 2:9]).all()
    for i in (1, 11):
        with pytest.raises(DataError, match="has no b at 2020-01-0"):
            store.read(store.channels(["b"]), [i], ROWS)


def test_statics_of_two_stores_must_be_the_same(tmp_path) -> None:
    data = dataset(states=4)
    for i in range(2):
        part = data.isel(time=slice(2 * i, 2 * i + 2)).assign(orography=data.orography + np.float32(i))
        part.to_netcdf(tmp_path / f"{i}.nc")
    with pytest.raises(DataError, match=r"orography is not the same in .*0.nc and in .*1.nc"):
        static_fields(FieldStore(str(tmp_path / "?.nc")), ["orography"], ROWS)


def test_stores_without_a_common_time_are_refused(tmp_path) -> None:
    data = dataset(states=8)
    data[["a"]].isel(time=slice(0, 4)).to_netcdf(tmp_path / "a.nc")
    data[["b"]].isel(time=slice(4, 8)).to_netcdf(tmp_path / "b.nc")
    with pytest.raises(
        DataError, match=r"no time at which all is there: a 2020-01-01T00:00 to 2020-01-01T18:00, b 2020"
    ):
        FieldStore(str(tmp_path / "?.nc"))


def test_a_forcing_that_is_stored_less_often_holds(tmp_path) -> None:
    """A sea surface temperature of each day, beside states every six hours."""
    data = dataset()
    data["sst"] = data.b * 2 + data.a
    data[["a", "b", "orography"]].to_zarr(tmp_path / "states.zarr", consolidated=False)
    data[["sst"]].isel(time=slice(0, None, 4)).to_netcdf(tmp_path / "daily.nc")
    data["sst"] = data.sst.isel(time=slice(0, None, 4)).reindex(time=data.time, method="ffill")
    data.to_zarr(tmp_path / "one.zarr", consolidated=False)
    losses = []
    for paths, hold in (
        ([str(tmp_path / "states.zarr"), str(tmp_path / "daily.nc")], {"sst": "1d"}),
        ([str(tmp_path / "one.zarr")], {}),
    ):
        raw = conf(tmp_path / f"run{len(losses)}", tmp_path, dtype="float64", rollout=2)
        raw["data"] |= {"path": paths, "forcings": ["cos_zenith", "sst"], "hold": hold}
        write_statistics(parse_config(raw))
        losses.append(curve(raw)[0])
    assert losses[0] == losses[1]
    raw["data"] |= {"path": [str(tmp_path / "states.zarr"), str(tmp_path / "daily.nc")], "hold": {"sst": "18h"}}
    with pytest.raises(DataError, match=r"has no sst at 2020-01-01T18:00 nor in the 18 h before \(data.hold\)"):
        write_statistics(parse_config(raw))
    raw["data"]["hold"] = {"a": "1d"}
    with pytest.raises(ConfigError, match="hold: a is not among the forcings that are read"):
        parse_config(raw)


def of_two_centres(data: xr.Dataset, folder: Path) -> list[dict[str, Any]]:
    """The first times of `a` under one centre's names; the rest and `b` under another's, whose own `a` is another."""
    first = data[["a", "orography"]].isel(time=slice(0, 25)).rename(a="t2m", orography="z")
    first.to_netcdf(folder / "one_1.nc")
    second = data.isel(time=slice(25, None))[["a"]].rename(a="2t")
    second.to_zarr(folder / "two_1.zarr", consolidated=False)
    swapped = data[["b"]].assign(other=data.b + 1).rename(b="a", other="b")
    swapped.to_netcdf(folder / "two_2.nc")
    return [
        {"path": str(folder / "one_*.nc"), "names": {"t2m": "a", "z": "orography"}},
        {"path": str(folder / "two_*.zarr"), "names": {"2t": "a"}},
        {"path": str(folder / "two_2.nc"), "names": {"a": "b", "b": "a_plus_1"}},
    ]


def test_a_run_on_stores_of_two_centres_is_that_on_one(tmp_path) -> None:
    data = dataset()
    losses = []
    for where in ({"path": str(write_zarr(tmp_path / "s.zarr", data))}, {"sources": of_two_centres(data, tmp_path)}):
        raw = conf(tmp_path / f"run{len(losses)}", tmp_path / "s.zarr", dtype="float64")
        del raw["data"]["path"]
        raw["data"] |= where
        write_statistics(parse_config(raw))
        losses.append(curve(raw)[0])
    assert losses[0] == losses[1]
    config = parse_config(raw)
    assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"t2m": "a"}, r"a at 2020-01-01T00:00 is in .*s.nc and in .*t.nc: leave one of them out"),
        ({"t2": "a"}, r"t.nc has no variable 't2', to be called 'a'; did you mean 't2m'\?"),
        ({"t2m": "d2m"}, r"t.nc has t2m, to be called d2m, and d2m: name it otherwise"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, names, said) -> None:
    data = dataset(states=5)[["a", "b"]]
    data.to_netcdf(tmp_path / "s.nc")
    data.rename(a="t2m", b="d2m").to_netcdf(tmp_path / "t.nc")
    with pytest.raises(DataError, match=said):
        FieldStore([str(tmp_path / "s.nc"), Source(path=[str(tmp_path / "t.nc")], names=names)])


def test_missing_values_are_known_by_the_name_that_a_source_gives(tmp_path) -> None:
    """A chunk that is all fill value, of a variable that has another name in the store."""
    data = dataset(states=4)
    write_zarr(tmp_path / "s.zarr", data.rename(a="sst"), rows_per_chunk=13)
    (tmp_path / "s.zarr" / "sst" / "c" / "1" / "0" / "0").unlink()
    source = Source(path=[str(tmp_path / "s.zarr")], names={"sst": "a"})
    store = FieldStore([source], missing={"a": "mask"})
    read = store.read(store.channels(["a"]), [0, 1], ROWS)[:, 0]
    np.testing.assert_array_equal(read[0], data.a.values[0, 2:9])
    assert np.isnan(read[1]).all()


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({}, "data: say where the fields are, in one of path and sources"),
        ({"path": "s.zarr", "sources": "t.zarr"}, "data: say where the fields are, in one of path and sources"),
        ({"sources": [{"path": "s.zarr", "nmaes": {}}]}, "data.sources.0.nmaes: unknown key; did you mean 'names'"),
        ({"sources": [{"path": "s.zarr", "names": {"t": "a", "u": "a"}}]}, "names: t and u are both called a"),
        ({"sources": [{"names": {"t": "a"}}]}, "data.sources.0.path: missing"),
    ],
)
def test_sources_that_cannot_be_are_refused(tmp_path, where, said) -> None:
    raw = conf(tmp_path, tmp_path)
    del raw["data"]["path"]
    raw["data"] |= where
    with pytest.raises(ConfigError, match=said):
        parse_config(raw)
