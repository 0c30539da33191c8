"""Values that are missing: numbers in their place, or a mask, left out of loss, statistics and scores, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scores as judge
import torch
import xarray as xr
import zarr

from credit.config import Loss, parse_config
from credit.data.grid import Grid
from credit.data.prepare import open_fields, write_statistics
from credit.data.store import Channel, FieldStore
from credit.errors import ConfigError, DataError
from credit.evaluation.forecast import forecast
from credit.evaluation.score import score
from credit.launch.job import start_job
from credit.training.loss import LatitudeWeightedLoss
from tests.stores import conf, dataset
from tests.training.runs import curve, fields_of, losses_and_weights, on


def with_gaps(land: float = np.nan) -> xr.Dataset:
    """`b` has no values on some land, `rain` none now and then; of `still` chunks are absent."""
    data = dataset()
    generator = np.random.default_rng(0)
    is_land = generator.random((13, 16)) < 0.3
    data["b"] = data.b.where(~is_land, land)
    data["rain"] = data.a.where(generator.random(data.a.shape) < 0.9)
    return data


def written(data: xr.Dataset, path: Path) -> Path:
    data.to_zarr(path, consolidated=False)
    return path


def config_of(folder: Path, store: Path, **changes: Any) -> dict[str, Any]:
    raw = conf(folder / "run", store, dtype="float64")
    raw["data"] |= {"variables": ["a", "b"], "forcings": ["rain"], "missing": {"b": "mask", "rain": 0}, **changes}
    raw["data"]["stats"] = str(folder / "stats.nc")
    write_statistics(parse_config(raw))
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return config_of(tmp_path, written(with_gaps(), tmp_path / "s.zarr"))


def areas() -> xr.DataArray:
    store = dataset(states=2)
    edges = np.clip(np.r_[90, (store.latitude.values[1:] + store.latitude.values[:-1]) / 2, -90], -90, 90)
    return xr.DataArray(
        np.abs(np.diff(np.sin(np.deg2rad(edges)))), dims="latitude", coords={"latitude": store.latitude}
    )


def test_statistics_are_of_the_values_that_are_there(raw, tmp_path) -> None:
    data = with_gaps().sel(time=slice("2020-01-01", "2020-01-06T18"))
    weights = areas()
    with xr.open_dataset(tmp_path / "stats.nc") as found:
        mean, std, change = (found[name].to_series() for name in ("mean", "std", "increment_std"))
    b = data.b.astype(np.float64).weighted(weights)
    assert mean["b"] == pytest.approx(float(b.mean()), rel=1e-9)
    assert std["b"] == pytest.approx(float(b.std()), rel=1e-6)
    steps = (data.b.astype(np.float64).diff("time") ** 2).weighted(weights).mean()
    assert change["b"] == pytest.approx(float(steps) ** 0.5, rel=1e-6)
    rain = data.rain.fillna(0).astype(np.float64).weighted(weights)
    assert mean["rain"] == pytest.approx(float(rain.mean()), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_is_that_of_one_process_and_what_is_missing_counts_for_nothing(worlds, raw, tmp_path, ranks) -> None:
    raw["trainer"]["rollout"] = 2
    losses, weights = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    for found, values in worlds(ranks).run(losses_and_weights, on(raw, tmp_path / "cut", "none", ranks)):
        np.testing.assert_allclose(found, losses, rtol=1e-9)
        for name, value in weights.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_the_loss_is_a_mean_over_the_values_that_are_there() -> None:
    store = dataset(states=2)
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 13, 16, generator=generator, dtype=torch.float64)
    mask = np.random.default_rng(0).random((2, 13, 16)) < 0.6
    grid = Grid(store.latitude.values, store.longitude.values)
    channels = [Channel("a"), Channel("b")]
    whole = 0.0
    for rows in (range(0, 4), range(4, 9), range(9, 13)):
        loss = LatitudeWeightedLoss(Loss(), grid, rows, channels, mask)
        whole += float(loss(prediction[..., rows, :], target[..., rows, :], torch.ones(3)))
    error = xr.DataArray((prediction - target).numpy() ** 2, dims=("sample", "channel", "latitude", "longitude"))
    seen = error.where(xr.DataArray(mask, dims=("channel", "latitude", "longitude")))
    wanted = seen.weighted(areas().drop_vars("latitude")).mean(["latitude", "longitude"]).mean("channel").sum()
    assert whole == pytest.approx(float(wanted), rel=1e-12)


def forecast_of(raw: dict[str, Any]) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        forecast(job)


def test_forecasts_have_the_gaps_and_scores_are_those_of_the_judge(worlds, raw, tmp_path) -> None:
    curve(raw)
    worlds(3).run(forecast_of, on(raw, tmp_path / "run", "none", 3))
    with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
        made = store.load()
    truth = with_gaps()
    is_land = truth.b.isel(time=0).isnull().values
    assert is_land.any()
    np.testing.assert_array_equal(np.isnan(made.b), np.broadcast_to(is_land, made.b.shape))
    assert not np.isnan(made.a).any()
    found = score(parse_config(raw))
    for lead in range(made.sizes["lead_time"]):
        ahead = made.isel(lead_time=lead)
        valid = ahead.init_time.values + made.lead_time.values[lead]
        there = truth.sel(time=valid).rename(time="init_time").assign_coords(init_time=ahead.init_time)
        for column, name in enumerate(("a", "b")):
            rmse = judge.continuous.rmse(ahead[name].astype(float), there[name].astype(float), weights=areas())
            bias = judge.continuous.additive_bias(ahead[name].astype(float), there[name].astype(float), weights=areas())
            assert found.rmse[0, lead, column] == pytest.approx(float(rmse), rel=1e-6)
            assert found.bias[0, lead, column] == pytest.approx(float(bias), rel=1e-4, abs=1e-6)


def test_gaps_that_move_are_no_mask(tmp_path) -> None:
    data = with_gaps()
    data["b"][30, 6, 6] = 1.0 if np.isnan(data.b[30, 6, 6]) else np.nan
    store = written(data, tmp_path / "s.zarr")
    raw = config_of(tmp_path, store)  # of a training period without it
    with pytest.raises(
        Exception, match=r"b is missing at other places at 2020-01-08T12:00 than in the training period"
    ):
        read_all(raw)
    data["b"][3, 6, 6] = data.b[30, 6, 6]
    with pytest.raises(DataError, match=r"b is missing at other places at 2020-01-01T18:00"):
        config_of(tmp_path, written(data, tmp_path / "other.zarr"))


def read_all(raw: dict[str, Any]) -> None:
    fields = open_fields(parse_config(raw))
    fields_of(raw).state(list(range(len(fields.times))))


def test_absent_chunks_are_what_is_said_of_them_or_refused(tmp_path) -> None:
    """Zarr leaves out chunks that are all fill: of rain, where it is dry."""
    data = dataset(states=8)
    path = tmp_path / "s.zarr"
    data.drop_vars("a").to_zarr(path, consolidated=False)
    array = zarr.open_group(path).create_array(
        "a", shape=data.a.shape, chunks=(1, 13, 16), dtype="f4", fill_value=0, dimension_names=data.a.dims
    )
    array[...] = data.a.where(data.time != data.time[2], 0).values
    assert not (path / "a" / "c" / "2").exists()
    for missing, wanted in (({}, None), ({"a": 5.0}, None), ({"a": 0}, 0.0)):
        store = FieldStore(path, missing=missing)
        if wanted is None:
            with pytest.raises(DataError, match=r"a has a chunk that was never written, time 2..2"):
                store.read(store.channels(["a"]), [2], range(13))
        else:
            assert (store.read(store.channels(["a"]), [2], range(13)) == wanted).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"missing": {"c": 0}}}, "missing: c is not among the variables that are read"),
        ({"trainer": {"loss": {"spectral": 0.1}}}, "trainer.loss.spectral: a latitude of b has gaps"),
        ({"constraints": [{"name": "conserve", "terms": {"b": 1}, "adjust": "b"}]}, "b has gaps, and no mean over the"),
        (
            {"constraints": [{"name": "conserve", "terms": {"a": 1}, "adjust": "a", "sources": {"b": 1}}]},
            "b has gaps, and no mean over the",
        ),
        ({"data": {"missing": {"b": float("nan")}}}, "missing"),
    ],
)
def test_what_gaps_make_impossible_is_refused(raw, change, said) -> None:
    for block, values in change.items():
        raw[block] = {**raw[block], **values} if isinstance(values, dict) else values
    with pytest.raises(ConfigError, match=said):
        parse_config(raw)
