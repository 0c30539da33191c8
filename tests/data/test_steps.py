"""Steps that are not whole hours: minutes, and calendar months, which are not equally long."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from credit.cli import main
from credit.config import parse_config
from credit.config.fields import parse_moment
from credit.data.climatology import ForcingClimatology, MeansByHour
from credit.data.describe import describe
from credit.data.grid import cos_zenith
from credit.data.prepare import write_statistics
from credit.data.rechunk import rechunk
from credit.data.store import FieldStore
from credit.errors import ConfigError, DataError
from credit.evaluation.forecast import forecast
from credit.evaluation.plots import plot_forecast, plot_map
from credit.evaluation.score import Scores, score
from credit.launch.job import start_job
from credit.steps import in_words, later, parse_step, to_text
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve

MONTH, QUARTER = np.timedelta64(1, "M"), np.timedelta64(15, "m")
ROWS = range(2, 9)


@pytest.mark.parametrize(
    ("given", "words", "text"),
    [
        ("6h", "6 h", "6h"),
        ("5d", "120 h", "120h"),
        ("15min", "15 min", "15min"),
        ("120min", "2 h", "2h"),
        ("90min", "90 min", "90min"),
        ("1mo", "1 month", "1mo"),
        (" 2y ", "24 months", "24mo"),
    ],
)
def test_a_step_is_what_it_is_written_as(given, words, text) -> None:
    step = parse_step(given)
    assert (in_words(step), to_text(step)) == (words, text)
    assert parse_step(text) == step


@pytest.mark.parametrize(
    "given", ["6", 6, "1m", "0min", "1.5h", "6 h", "-1h", "PT6H", "month", "1201mo", "1000001h", ""]
)
def test_what_is_no_step_is_refused(given) -> None:
    with pytest.raises(ValueError, match=r"is not a duration; write it like|is longer than"):
        parse_step(given)


def test_a_month_later_is_as_far_into_the_month() -> None:
    """A value of the middle of January holds until that of February, of whichever length both are."""
    for begin in ("2020-01-01T00", "2020-01-16T12", "2020-02-15T00", "2019-12-01T06"):
        time = np.array([begin], "datetime64[ns]")
        found = pd.Timestamp(later(time, MONTH)[0])
        assert found == pd.Timestamp(begin) + pd.DateOffset(months=1)
    assert str(later(np.datetime64("2019-12"), MONTH)) == "2020-01"


def steps(raw: dict[str, Any], step: str, lead: str, **data: Any) -> dict[str, Any]:
    return {**raw, "data": {**raw["data"], "step": step, **data}, "forecast": {"lead": lead}}


@pytest.mark.parametrize(
    ("step", "lead", "data", "said"),
    [
        ("1mo", "30d", {}, "forecast.lead 720 h is not a multiple of data.step 1 month"),
        ("30d", "1mo", {}, "forecast.lead 1 month is not a multiple of data.step 720 h"),
        ("2mo", "3mo", {}, "forecast.lead 3 months is not a multiple of data.step 2 months"),
        ("40min", "1h", {}, "forecast.lead 1 h is not a multiple of data.step 40 min"),
        ("1mo", "1y", {"forcings": ["sst"], "hold": {"sst": "30d"}}, "hold: data.step is of months, and so is"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(step, lead, data, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_config(steps(conf(Path("run"), Path("s.zarr")), step, lead, **data))


def test_a_step_is_written_back_as_it_was_before_there_were_minutes() -> None:
    """Runs and statistics of before are the same ones."""
    raw = conf(Path("run"), Path("s.zarr"))
    config = parse_config(steps(raw, "1d", "5d", forcings=["sst"], hold={"sst": "2d"})).to_dict()
    assert (config["data"]["step"], config["data"]["hold"], config["forecast"]["lead"]) == (
        "24h",
        {"sst": "48h"},
        "120h",
    )
    assert str(parse_moment("2020-02")) == "2020-02-01 00:00:00"


def every(data: xr.Dataset, step: str, begin: str = "2000-01-01", **calendar: Any) -> xr.Dataset:
    return data.assign_coords(time=xr.date_range(begin, periods=data.sizes["time"], freq=step, **calendar))


def means_of(data: xr.Dataset, calendar: str, stamp: str) -> xr.Dataset:
    """Of months, with the time of the `begin`, `middle` or `end` of each, and CF's bounds."""
    edges = xr.date_range("2000-01-01", periods=data.sizes["time"] + 1, freq="MS", calendar=calendar, use_cftime=True)
    begin, end = edges.values[:-1], edges.values[1:]
    stamps = {"begin": begin, "middle": begin + (end - begin) / 2, "end": end}[stamp]
    bounded = data.assign(time_bnds=(("time", "nbnd"), np.stack([begin, end], axis=1)))
    units = {"units": "days since 1850-01-01", "calendar": calendar}
    return bounded.assign_coords(time=("time", stamps, {"bounds": "time_bnds"}, units))


def packed(data: xr.Dataset, path: Path, **how: Any) -> Path:
    data.to_netcdf(path, **how)
    return path


MONTHLY: dict[str, Callable[[xr.Dataset, Path], Path]] = {
    "ERA5 of months": lambda d, p: packed(every(d, "MS").rename(time="valid_time"), p / "s.nc"),
    "zarr of months": lambda d, p: write_zarr(p / "s.zarr", every(d, "MS")),
    "ends of months": lambda d, p: packed(every(d, "ME"), p / "s.nc"),
    "middles of months": lambda d, p: packed(means_of(d, "standard", "middle").drop_vars("time_bnds"), p / "s.nc"),
    "CMIP of noleap": lambda d, p: packed(means_of(d, "noleap", "middle"), p / "s.nc"),
    "CMIP of 360_day": lambda d, p: packed(means_of(d, "360_day", "middle"), p / "s.nc"),
    "CMIP of julian": lambda d, p: packed(means_of(d, "julian", "middle"), p / "s.nc"),
    "CESM, whose times are the ends": lambda d, p: packed(means_of(d, "noleap", "end"), p / "s.nc"),
    "beginnings of 360_day": lambda d, p: packed(every(d, "MS", calendar="360_day", use_cftime=True), p / "s.nc"),
    "beginnings of noleap in float32": lambda d, p: packed(
        every(d, "MS", calendar="noleap", use_cftime=True),
        p / "s.nc",
        encoding={"time": {"units": "days since 1850-01-01", "dtype": "f4"}},
    ),
}


@pytest.mark.parametrize("kind", MONTHLY)
def test_months_of_any_calendar_are_one_apart(tmp_path, kind) -> None:
    data = dataset(states=30)
    path = MONTHLY[kind](data, tmp_path)
    store = FieldStore(path, ["a"], monthly=True)
    np.testing.assert_array_equal(store.times, np.datetime64("2000-01") + MONTH * np.arange(30))
    channels = store.channels(["b", "a"])
    wanted = np.stack([data.b.values[[25, 1], 2:9], data.a.values[[25, 1], 2:9]], axis=1)
    np.testing.assert_array_equal(store.read(channels, [25, 1], ROWS), wanted)
    period = (datetime(2000, 1, 1), datetime(2002, 3, 1))
    assert store.starts(period, MONTH, 2, "refuse").tolist() == list(range(24))
    assert bool(store.notes) == kind.startswith(("ends", "middles", "CMIP", "CESM"))
    said = describe([str(path)])
    assert "30 times, 2000-01 to 2002-06 every 1mo" in said
    assert "step: 1mo" in said
    if kind.startswith(("CESM", "beginnings")):
        rechunk(str(path), tmp_path / "copy.zarr", None, 30, lambda done, total: None)
        again = FieldStore(tmp_path / "copy.zarr", ["a"], monthly=True)
        np.testing.assert_array_equal(again.times, store.times)


MINUTES: dict[str, tuple[str, Callable[[xr.Dataset, Path], Path]]] = {
    "HRRR": ("15min", lambda d, p: packed(every(d, "15min"), p / "s.nc")),
    "radar": ("5min", lambda d, p: write_zarr(p / "s.zarr", every(d, "5min", "2020-02-28T23:00"))),
    "half hours": ("30min", lambda d, p: write_zarr(p / "s.zarr", every(d, "30min", "2020-02-28T23:15"))),
    "every minute": ("1min", lambda d, p: packed(every(d, "1min"), p / "s.nc")),
    "scans that begin when they can": (
        "5min",
        lambda d, p: packed(
            every(d, "5min").pipe(
                lambda d: d.assign_coords(time=d.time + (np.arange(30) * 7 % 50 - 25).astype("timedelta64[s]"))
            ),
            p / "s.nc",
        ),
    ),
}


@pytest.mark.parametrize("kind", MINUTES)
def test_steps_of_minutes_are_read(tmp_path, kind) -> None:
    text, write = MINUTES[kind]
    data = dataset(states=30)
    path, step = write(data, tmp_path), parse_step(text)
    store = FieldStore(path)
    assert (np.diff(store.times) == step).all()
    np.testing.assert_array_equal(store.read(store.channels(["a"]), [29, 2], ROWS)[:, 0], data.a.values[[29, 2], 2:9])
    period = (datetime(2000, 1, 1), datetime(2021, 1, 1))
    assert len(store.starts(period, step, 3, "refuse")) == 27
    assert bool(store.notes) == kind.startswith("scans")
    assert f"every {text}" in describe([str(path)])


def refused(path: Path, said: str, step: np.timedelta64, **how: Any) -> None:
    with pytest.raises(DataError, match=said) as caught:
        FieldStore(path, ["a"], **how).starts((datetime(1999, 1, 1), datetime(2021, 1, 1)), step, 1, "refuse")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_with_other_steps_is_refused_where_they_break(tmp_path) -> None:
    data = dataset(states=30)
    daily = write_zarr(tmp_path / "daily.zarr", every(data, "1D", "2000-01-15"))
    refused(daily, "2000-01 has 17 times, from 2000-01-15T00:00 on: .*write the means of months", MONTH, monthly=True)
    refused(daily, "2000-01-15T00:00 is not followed by a time 15 min later", QUARTER)
    gap = write_zarr(tmp_path / "gap.zarr", every(data, "MS").isel(time=[0, 1, 2, 4, 5]))
    refused(gap, "2000-03 is not followed by a time 1 month later", MONTH, monthly=True)
    refused(gap, "2000-02-01T00:00 is not followed by a time 744 h later", np.timedelta64(744, "h").astype("m8[m]"))
    odd = every(data, "15min")
    odd = odd.assign_coords(time=odd.time + np.where(np.arange(30) == 7, 61, 0).astype("timedelta64[s]"))
    refused(write_zarr(tmp_path / "odd.zarr", odd), "2000-01-01T01:30 is not followed by a time 15 min later", QUARTER)
    days = packed(every(data, "6h", calendar="360_day", use_cftime=True), tmp_path / "days.nc")
    refused(days, "its calendar is 360_day", np.timedelta64(6, "h"))
    shuffled = every(data, "MS").isel(time=[0, 2, 1, 3])
    refused(write_zarr(tmp_path / "x.zarr", shuffled), "2000-02 comes out of order, at 2 of 4", MONTH, monthly=True)


def test_the_sun_of_a_month_is_the_mean_over_its_middle_day() -> None:
    latitude, longitude = np.linspace(90, -90, 19), np.arange(4) * 90.0
    months = np.datetime64("2001-01") + MONTH * np.arange(12)
    minutes = np.arange(0, 24 * 60, 2).astype("timedelta64[m]")
    found = cos_zenith(months, latitude, longitude)
    for month, field in zip(months, found, strict=True):
        begin = month.astype("datetime64[s]")
        middle = begin + ((month + MONTH).astype("datetime64[s]") - begin) // 2
        noon = middle.astype("datetime64[D]") + np.timedelta64(12, "h")
        day = cos_zenith(noon - np.timedelta64(12, "h") + minutes, latitude, longitude)
        np.testing.assert_allclose(field, day.mean(axis=0), atol=4e-3)


def test_forcings_of_future_months_are_the_means_of_theirs() -> None:
    collected = MeansByHour(["x"], (2, 3))
    months = np.datetime64("2000-01") + MONTH * np.arange(36)
    for number, month in enumerate(months):
        collected.add(month, np.full((1, 2, 3), number % 12 + number // 12))
    means = ForcingClimatology(collected.means(np.array([1.0, -1.0]), np.arange(3.0)))
    found = means.at("x", np.datetime64("2010-01") + MONTH * np.arange(12), range(2))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(12.0)[:, None, None] + 1, (12, 2, 3)))


def test_a_forcing_of_months_holds_between_minutes(tmp_path) -> None:
    data = dataset(states=30)
    states = every(data, "15min", "2000-01-31T20:00")
    write_zarr(tmp_path / "states.zarr", states[["a"]])
    write_zarr(tmp_path / "sst.zarr", every(data, "MS")[["b"]])
    store = FieldStore([str(tmp_path / "states.zarr"), str(tmp_path / "sst.zarr")], ["a", "b"], hold={"b": MONTH})
    read = store.read(store.channels(["b"]), range(30), ROWS)[:, 0]
    np.testing.assert_array_equal(read, data.b.values[np.where(np.arange(30) < 16, 0, 1), 2:9])


def run_of(folder: Path, step: str, lead: str, begin: np.datetime64, **how: Any) -> dict[str, Any]:
    """A run of states that are all alike but for their times."""
    raw = conf(folder / "run", folder / "s.zarr", epochs=1, dtype="float64")
    unit = parse_step(step)
    bounds = [str((begin + unit * count).astype("datetime64[m]")) for count in (0, 24, 32, 40)]
    periods = dict(zip(("train", "valid", "test"), itertools.pairwise(bounds), strict=True))
    raw = steps(raw, step, lead, forcings=[], **{name: list(period) for name, period in periods.items()})
    write_statistics(parse_config(raw))
    return raw


def cast(raw: dict[str, Any], **given: Any) -> Path:
    with start_job(lambda: parse_config({**raw, "forecast": {**raw["forecast"], **given}})) as job:
        return forecast(job)


KINDS = {
    "hours": ("6h", "24h", np.datetime64("2000-01-01T00", "m"), lambda d: every(d, "6h")),
    "minutes": ("15min", "1h", np.datetime64("2000-01-01T00", "m"), lambda d: every(d, "15min")),
    "months": ("1mo", "4mo", np.datetime64("2000-01", "M"), lambda d: means_of(d, "360_day", "middle")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[dict[str, Any], list[float], Scores]]:
    """The same states under three kinds of times: trained, forecast and scored."""
    found = {}
    for kind, (step, lead, begin, change) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        change(dataset()).to_zarr(folder / "s.zarr", consolidated=False)
        raw = run_of(folder, step, lead, begin)
        losses = curve(raw)[0]
        cast(raw)
        found[kind] = raw, losses, score(parse_config(raw))
    return found


@pytest.mark.parametrize("kind", ["minutes", "months"])
def test_a_run_does_not_depend_on_what_its_times_are_called(runs, kind) -> None:
    (raw, losses, scores), (_, wanted_losses, wanted) = runs[kind], runs["hours"]
    assert losses == wanted_losses
    for name in ("rmse", "bias", "acc", "crps"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(wanted, name), err_msg=name)
    assert scores.starts == wanted.starts == 4
    assert plot_map(parse_config(raw), scores).exists()


def test_leads_of_minutes_are_labelled_and_written_without_loss(runs) -> None:
    raw, _, scores = runs["minutes"]
    with xr.open_zarr(Path(raw["run"]) / "forecast.zarr", consolidated=False) as made:
        assert (made.lead_time.values == QUARTER * np.arange(1, 5)).all()
        assert (np.diff(made.init_time.values) == QUARTER).all()
        assert made.init_time.encoding["units"] == "minutes since 1970-01-01"
    assert scores.lead_numbers() == [0.25, 0.5, 0.75, 1.0]
    assert scores.lead_words() == ["15 min", "30 min", "45 min", "1 h"]
    assert " 15 min " in scores.table()
    scores.save(Path(raw["run"]) / "scores.csv")
    assert pd.read_csv(Path(raw["run"]) / "scores.csv")["lead_hours"].unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    paths = [cast(raw, start=f"2000-01-01T09:{minute}") for minute in (15, 30)]
    assert [path.name for path in paths] == ["forecast-2000-01-01T0915.zarr", "forecast-2000-01-01T0930.zarr"]


def test_leads_of_months_are_counted_in_months(runs, capsys) -> None:
    raw, _, scores = runs["months"]
    with xr.open_zarr(Path(raw["run"]) / "forecast.zarr", consolidated=False) as made:
        assert (made.lead_time.values.tolist(), made.lead_time.attrs["units"]) == ([1, 2, 3, 4], "months")
        for init, valid in zip(made.init_time.values, made.valid_time.values, strict=True):
            assert [pd.Timestamp(init) + pd.DateOffset(months=n) for n in (1, 2, 3, 4)] == [*map(pd.Timestamp, valid)]
    assert scores.lead_words()[:2] == ["1 month", "2 months"]
    scores.save(Path(raw["run"]) / "scores.csv")
    assert pd.read_csv(Path(raw["run"]) / "scores.csv")["lead_months"].unique().tolist() == [1, 2, 3, 4]
    file = Path(raw["run"]).parent / "my.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert main(["forecast", str(file), "--start", "latest", "--lead", "1y", "--at", "30,20"]) == 0
    path = Path(raw["run"]) / "forecast-2003-04.zarr"
    assert "forecasts from 2003-04 of 12 months" in capsys.readouterr().out
    table = pd.read_csv(Path(raw["run"]) / "forecast-2003-04-at-30,20.csv")
    assert table["valid_time"].tolist() == [f"2003-{n:02}-01T00:00" for n in range(5, 13)] + [
        f"2004-{n:02}-01T00:00" for n in range(1, 5)
    ]
    assert plot_forecast(parse_config(raw), path).exists()
    middle = cast(raw, start="2003-02-15", layout="weatherbench2")
    assert middle.name == "forecast-2003-02.zarr"
    with xr.open_zarr(middle, consolidated=False) as made:
        assert made.valid_time.dims == ("time", "prediction_timedelta")


def test_members_from_one_hour_are_told_apart_by_their_minutes(tmp_path) -> None:
    """From states that are all alike."""
    data = every(dataset(), "15min")
    data.isel(time=np.minimum(np.arange(40), 32)).assign_coords(time=data.time).to_zarr(tmp_path / "s.zarr")
    raw = run_of(tmp_path, "15min", "15min", np.datetime64("2000-01-01T00", "m"))
    raw["trainer"]["loss"] = {"kind": "crps", "members": 2}
    curve(raw)
    with xr.open_zarr(cast(raw, members=2), consolidated=False) as made:
        fields = made.a.values.reshape(-1, 13, 16)
    assert len(fields) > 4
    assert all((one != other).any() for one, other in itertools.combinations(fields, 2))
