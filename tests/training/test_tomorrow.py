"""A forecast from one start: of the newest state, beyond the data, from other stores, with weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
import zarr

from credit.cli import main
from credit.config import parse_config
from credit.data.climatology import ForcingClimatology, MeansByHour
from credit.data.dataset import Fields
from credit.data.prepare import load_fields_statistics, write_statistics
from credit.data.store import FieldStore
from credit.errors import ConfigError, CreditError, DataError
from credit.evaluation.forecast import forecast
from credit.evaluation.plots import plot_map
from credit.evaluation.score import score
from credit.evaluation.series import series
from credit.launch.job import start_job
from tests.stores import START, conf, dataset, with_forcing, write_zarr
from tests.training.runs import curve, exported, on

STEP = np.timedelta64(6, "h")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A trained run with history, a diagnostic and a stored forcing; and its folder."""
    folder = tmp_path_factory.mktemp("run")
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", with_forcing(dataset())), epochs=1)
    raw["data"] |= {"variables": ["a"], "diagnostics": ["b"], "history": 2, "stats": str(folder / "stats.nc")}
    raw["data"]["forcings"] = ["cos_zenith", "warmth"]
    write_statistics(parse_config(raw))
    curve(raw)
    return raw, folder


def cast(raw: dict[str, Any], **given: Any) -> xr.Dataset:
    with start_job(lambda: parse_config({**raw, "forecast": {**raw["forecast"], **given}})) as job:
        path = forecast(job)
    with xr.open_zarr(path, consolidated=False) as store:
        return store.load()


def same(found: xr.Dataset, wanted: xr.Dataset, rtol: float = 0) -> None:
    for name in ("a", "b"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=0, err_msg=name)


def test_one_start_is_that_of_the_test_period(run) -> None:
    raw, _ = run
    of_period = cast(raw)
    start = of_period.init_time.values[2]
    found = cast(raw, start=str(start)[:16])
    assert found.init_time.values.tolist() == [start.astype(int)]
    same(found, of_period.isel(init_time=[2]))


def cut_off(run: tuple[dict[str, Any], Path], tmp_path: Path, states: int, turn: int = 1) -> Path:
    """What is known of today: states and statics of the first times, no diagnostics, and no forcings."""
    _, folder = run
    with xr.open_zarr(folder / "s.zarr", consolidated=False) as store:
        known = store[["a", "orography"]].isel(time=slice(0, states), latitude=slice(None, None, turn)).load()
    return write_zarr(tmp_path / "analysis.zarr", known)


def test_beyond_the_data_a_forecast_is_what_it_would_be_with_them(run, worlds, tmp_path) -> None:
    """The stored forcing is its own climatology."""
    raw, _ = run
    analysis = cut_off(run, tmp_path, 36)
    wanted = cast(raw, start="2020-01-09T18")
    found = cast(raw, start="latest", source=str(analysis))
    assert found.init_time.values[0] == np.datetime64("2020-01-09T18")
    assert found.init_time.values[0] + found.lead_time.values[-1] > np.datetime64("2020-01-09T18")
    same(found, wanted, rtol=2e-5)
    assert found["b"].attrs == {}  # what units it has the analysis does not know
    on_mesh = {**on(raw, Path(raw["run"]), "none", 2), "forecast": {**raw["forecast"], "start": "latest"}}
    on_mesh["forecast"]["source"] = str(analysis)
    worlds(2).run(cast, on_mesh)
    with xr.open_zarr(Path(raw["run"]) / "forecast-2020-01-09T18.zarr", consolidated=False) as store:
        same(store.load(), found, rtol=2e-5)


def test_an_analysis_with_its_rows_the_other_way_has_the_forcings_of_its_places(run, tmp_path) -> None:
    raw, _ = run
    config = parse_config({**raw, "forecast": {**raw["forecast"], "start": "latest"}})
    found = []
    for turn in (1, -1):
        store = FieldStore(cut_off(run, tmp_path, 36, turn), ["a"])
        statistics = load_fields_statistics(config, store, ["a"])
        fields = Fields(config, store, statistics, range(13), beyond=True)
        found.append(fields.given(np.array(["2020-01-20T06"], "datetime64[ns]")))
    assert torch.equal(found[0], found[1].flip(-2))


def test_fields_with_their_rows_the_other_way_are_refused(run, tmp_path) -> None:
    """A model is not the same upside down."""
    raw, _ = run
    with pytest.raises(CreditError, match=r"data.grid was .*, 90 to -90.* and is .*, -90 to 90"):
        cast(raw, start="latest", source=str(cut_off(run, tmp_path, 36, -1)))


def test_an_analysis_in_other_units_is_refused(run, tmp_path) -> None:
    raw, _ = run
    path = cut_off(run, tmp_path, 36)
    for units, said in (
        ("m/s", None),
        ("m s**-1", None),
        ("", None),
        ("knots", "a is in knots in .*, and the statistics"),
    ):
        zarr.open_array(path / "a", mode="r+").attrs["units"] = units
        if said is None:
            cast(raw, start="latest", source=str(path), lead="6h")
        else:
            with pytest.raises(CreditError, match=f"{said} are of m s-1: convert the field"):
                cast(raw, start="latest", source=str(path), lead="6h")


def test_weights_alone_forecast_as_the_run_does_and_no_others(run, tmp_path, capsys) -> None:
    raw, _ = run
    exported(raw, tmp_path / "w.safetensors")
    wanted = cast(raw, start="latest")
    elsewhere = {**raw, "run": str(tmp_path / "elsewhere")}
    same(cast(elsewhere, start="latest", weights=str(tmp_path / "w.safetensors")), wanted)
    other = {**elsewhere, "model": {**raw["model"], "groups": 1}}
    with pytest.raises(CreditError, match=r"forecast.weights are of another config: model.groups was 2 and is 1"):
        cast(other, start="latest", weights=str(tmp_path / "w.safetensors"))
    other = {**elsewhere, "data": {**raw["data"], "variables": ["b"], "diagnostics": ["a"]}}
    with pytest.raises(CreditError, match=r"data.variables was \['a'\] and is \['b'\]"):
        cast(other, start="latest", weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start": "2030-01-01"}, "no state at 2030-01-01T00:00 with those up to 6 h before is stored"),
        ({"start": "2020-01-01"}, "no state at 2020-01-01T00:00 with those up to 6 h before is stored"),
        ({"start": "tomorrow"}, "forecast.start: neither latest nor a time: 'tomorrow' is no date"),
        ({"source": ["x.zarr"]}, "source is what one forecast starts from: set start"),
        ({"start": "latest", "source": ["x.zarr"]}, "there is no x.zarr"),
    ],
)
def test_what_cannot_be_started_is_refused(run, given, said) -> None:
    with pytest.raises(CreditError, match=said):
        cast(run[0], **given)


def test_the_command_draws_what_it_made(run, tmp_path, capsys) -> None:
    raw, _ = run
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    assert main(["forecast", str(tmp_path / "c.yaml"), "--start", "2020-01-09T12", "--lead", "2d"]) == 0
    path = Path(raw["run"]) / "forecast-2020-01-09T12.png"
    assert str(path) in capsys.readouterr().out
    assert path.stat().st_size > 10_000


def test_a_climatology_is_the_mean_by_hour_between_the_middles_of_months() -> None:
    latitude, longitude = np.array([1.0, -1.0]), np.array([0.0, 120.0, 240.0])
    collected = MeansByHour(["x"], (2, 3))
    times = np.arange("2019-01-01", "2021-01-01", 6, dtype="datetime64[h]").astype("datetime64[ns]")
    month = times.astype("datetime64[M]").astype(int) % 12
    hour = times.astype("datetime64[h]").astype(int) % 24
    for time, m, h in zip(times, month, hour, strict=True):
        collected.add(time, np.full((1, 2, 3), 100.0 * m + h))
    climatology = ForcingClimatology(collected.means(latitude, longitude))

    def at(time: str) -> float:
        field = climatology.at("x", np.array([time], "datetime64[ns]"), range(1, 2))
        assert field.shape == (1, 1, 3)
        assert (field == field.flat[0]).all()
        return float(field.flat[0])

    assert at("2026-04-16T00") == pytest.approx(300, abs=0.01)  # the middle of April
    assert at("2026-06-16T12") == pytest.approx(100 * 5 + 12, abs=2)
    assert at("2026-05-01T06") == pytest.approx(100 * 3.5 + 6, abs=2)
    assert at("2026-12-31T18") == pytest.approx(100 * 11 / 2 + 18, abs=20)  # half-way from December to January
    with pytest.raises(DataError, match="no climatology of 3 h"):
        at("2026-04-16T03")


def test_the_layout_of_weatherbench_2_holds_the_same_and_is_scored(run) -> None:
    raw, _ = run
    raw = {**raw, "forecast": {"lead": "24h"}}
    cast(raw)
    wanted = score(parse_config(raw))
    raw["forecast"]["layout"] = "weatherbench2"
    found = cast(raw)
    assert found.a.dims == ("time", "prediction_timedelta", "latitude", "longitude")
    assert found.prediction_timedelta.values[0] == STEP
    np.testing.assert_array_equal(score(parse_config(raw)).rmse, wanted.rmse)
    assert plot_map(parse_config(raw), wanted).exists()


def test_the_series_at_a_place_is_that_of_the_nearest_point(run, tmp_path, capsys) -> None:
    raw, folder = run
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(raw))
    command = ["forecast", str(tmp_path / "my.yaml"), "--start", "latest", "--lead", "12h", "--at"]
    assert main([*command, "52.5,-13.4"]) == 0
    store = next((folder / "run").glob("forecast-*T18.zarr"))
    table = pd.read_csv(store.with_name(f"{store.stem}-at-52.5,-13.4.csv"))
    with xr.open_zarr(folder / "run" / "forecast-2020-01-10T18.zarr", consolidated=False) as made:
        point = made.sel(latitude=60, longitude=337.5).isel(init_time=0)
        np.testing.assert_allclose(table["a"], point.a, rtol=1e-6)
        np.testing.assert_allclose(table["b"], point.b, rtol=1e-6)
    assert table["valid_time"].tolist() == ["2020-01-11T00:00", "2020-01-11T06:00"]
    assert "-at-52.5,-13.4.png" in capsys.readouterr().out
    for place in ("north", "52.5", "100,0"):
        assert main([*command, place]) == 2
        assert "is no place" in capsys.readouterr().err


def test_a_series_is_refused_before_the_forecast_is_made(run, tmp_path, capsys, worlds) -> None:
    raw, _ = run
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**raw, "run": str(tmp_path / "none")}))
    assert main(["forecast", str(tmp_path / "my.yaml"), "--at", "52.5,13.4"]) == 2
    assert "--at is of one forecast: give --start too" in capsys.readouterr().err  # not: there is no checkpoint
    cut = on(raw, Path(raw["run"]), "none", 2)
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(cut))
    words = ["forecast", str(tmp_path / "cut.yaml"), "--start", "latest", "--lead", "12h", "--at", "52.5,13.4"]
    assert worlds(2).run(main, words) == [0, 0]


def test_the_series_of_a_region_with_uneven_rows_ends_at_its_cells(tmp_path) -> None:
    latitude, longitude = np.array([70.0, 69.7, 69.3, 68.0, 65.0, 63.0]), np.arange(4.0)
    field = xr.DataArray(
        np.arange(24.0).reshape(1, 1, 6, 4),
        dims=("init_time", "lead_time", "latitude", "longitude"),
        coords={"init_time": [START], "lead_time": [STEP], "latitude": latitude, "longitude": longitude},
    )
    field.to_dataset(name="a").to_zarr(tmp_path / "f.zarr", consolidated=False)
    assert float(series(tmp_path / "f.zarr", 64, 3).latitude) in (63, 65)
    assert float(series(tmp_path / "f.zarr", 62.1, -0.4).longitude) == 0
    for place in ((61.9, 1), (70.2, 1), (66, 3.6), (66, -0.6)):
        with pytest.raises(ConfigError, match="is outside the grid of"):
            series(tmp_path / "f.zarr", *place)
