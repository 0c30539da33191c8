"""Scores: formulas written out in numpy, the `scores` library where it is installed, and any number of ranks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from credit.commands.score import show as show_scores
from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.data.store import FieldStore
from credit.evaluation.score import FIELDS, FORECASTS, Scores, score, zonal_power
from tests.pictures import assert_not_blank
from tests.ranks import RankError
from tests.stores import conf, dataset, write_zarr

STARTS, LEADS, TRAINED = np.array([30, 32, 34, 35]), 4, 24
CHANNELS = {"b": ("b", None), "c_500": ("c", 500.0), "c_850": ("c", 850.0)}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict:
    """A store of noise around waves, and forecasts that are the truth with an error that grows."""
    folder: Path = tmp_path_factory.mktemp("score")
    noise = np.random.default_rng(0)
    truth = dataset(levels=(500.0, 850.0)).drop_vars("orography")
    truth = truth.map(lambda field: (field + 0.3 * noise.standard_normal(field.shape)).astype(np.float32))
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", truth))
    raw["data"].update(variables=["b", "c"], levels=[500, 850], statics=[])
    write_statistics(parse_config(raw))
    hours = np.timedelta64(6, "h") * np.arange(1, LEADS + 1)
    made = [truth[["b", "c"]].isel(time=start + np.arange(1, LEADS + 1)) for start in STARTS]
    made = [one.drop_vars("time").rename(time="lead_time").assign_coords(lead_time=hours) for one in made]
    forecasts = xr.concat(made, "init_time").assign_coords(init_time=truth.time.values[STARTS])
    grown = xr.DataArray(np.arange(1, LEADS + 1), dims="lead_time")
    forecasts = forecasts.map(lambda field: field + grown * field.copy(data=noise.normal(0.1, 0.2, field.shape)))
    forecasts.astype(np.float32).to_zarr(folder / "run" / "forecast.zarr", consolidated=False)
    return raw


@pytest.fixture(scope="module")
def found(raw) -> Scores:
    return score(parse_config(raw))


def fields_of(raw: dict, channel: str, lead: int) -> dict[str, np.ndarray]:
    """Truth and forecasts, (start, latitude, longitude), float64."""
    variable, level = CHANNELS[channel]
    with (
        xr.open_zarr(raw["data"]["path"], consolidated=False) as store,
        xr.open_zarr(Path(raw["run"]) / "forecast.zarr", consolidated=False) as forecasts,
    ):
        at = {} if level is None else {"level": level}
        stored = store[variable].sel(at).values.astype(np.float64)
        model = forecasts[variable].sel(at).isel(lead_time=lead).values.astype(np.float64)
    climatology = stored[:TRAINED].mean(axis=0, keepdims=True) + 0 * model
    return {
        "truth": stored[STARTS + lead + 1],
        "model": model,
        "persistence": stored[STARTS],
        "climatology": climatology,
    }


def area(raw: dict) -> np.ndarray:
    return FieldStore(raw["data"]["path"]).grid.latitude_weights()


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("lead", [0, 3])
def test_scores_are_those_of_the_formulas(raw, found, channel, lead) -> None:
    fields, column = fields_of(raw, channel, lead), found.channels.index(channel)
    weight = (area(raw) / area(raw).sum())[None, :, None] / fields["truth"].shape[-1]
    anomaly = fields["truth"] - fields["climatology"]
    for f, name in enumerate(FORECASTS):
        error, of_forecast = fields[name] - fields["truth"], fields[name] - fields["climatology"]
        at = (f, lead, column)
        assert found.rmse[at] == pytest.approx(np.sqrt((error**2 * weight).sum() / len(STARTS)), rel=1e-6)
        assert found.bias[at] == pytest.approx((error * weight).sum() / len(STARTS), rel=1e-5, abs=1e-6)
        if name == "climatology":
            assert np.isnan(found.acc[at])
            continue
        product, ours, theirs = (
            (part * weight).sum(axis=(1, 2)) for part in (of_forecast * anomaly, of_forecast**2, anomaly**2)
        )
        assert found.acc[at] == pytest.approx((product / np.sqrt(ours * theirs)).mean(), rel=1e-5)
    for f, name in enumerate(FIELDS):
        both_ways = np.abs(np.fft.fft(fields[name]) / fields[name].shape[-1]) ** 2
        expected = (both_ways * weight * fields[name].shape[-1]).sum(axis=1).mean(axis=0)
        waves = fields[name].shape[-1] // 2
        expected[1:waves] += expected[:waves:-1]  # a wave and its conjugate
        np.testing.assert_allclose(
            found.power[f, lead, column], expected[: waves + 1], rtol=1e-3
        )  # of a float32 climatology
        mean_square = (fields[name] ** 2 * weight).sum() / len(STARTS)
        assert found.power[f, lead, column].sum() == pytest.approx(mean_square, rel=1e-6)


@pytest.mark.parametrize("longitudes", [5, 6])
def test_powers_add_up_to_the_mean_square(longitudes) -> None:
    field = np.random.default_rng(longitudes).standard_normal((3, longitudes))
    np.testing.assert_allclose(zonal_power(field).sum(axis=-1), (field**2).mean(axis=-1), rtol=1e-12)


@pytest.mark.parametrize("channel", CHANNELS)
def test_scores_are_those_of_the_scores_library(raw, found, channel) -> None:
    """ACC, which it does not have, by way of mean squares: 2 f a = f^2 + a^2 - (f - a)^2."""
    library = pytest.importorskip("scores").continuous
    dims = ("start", "latitude", "longitude")
    weight = xr.DataArray(area(raw), dims="latitude")
    for lead in range(LEADS):
        fields = {name: xr.DataArray(field, dims=dims) for name, field in fields_of(raw, channel, lead).items()}
        truth, climatology = fields["truth"], fields["climatology"]
        column = found.channels.index(channel)
        for f, name in enumerate(FORECASTS):
            at = (f, lead, column)
            assert found.rmse[at] == pytest.approx(float(library.rmse(fields[name], truth, weights=weight)), rel=1e-6)
            bias = float(library.mean_error(fields[name], truth, weights=weight))
            assert found.bias[at] == pytest.approx(bias, rel=1e-5, abs=1e-6)
            if name != "climatology":
                ours, theirs, apart = (
                    library.mse(*pair, preserve_dims="start", weights=weight)
                    for pair in ((fields[name], climatology), (truth, climatology), (fields[name], truth))
                )
                acc = float(((ours + theirs - apart) / (2 * (ours * theirs) ** 0.5)).mean())
                assert found.acc[at] == pytest.approx(acc, rel=1e-5)


MEMBERS = 4


@pytest.fixture(scope="module")
def ensemble(raw, tmp_path_factory) -> dict:
    """As `raw`, with members around each forecast."""
    run = tmp_path_factory.mktemp("ensemble")
    noise = np.random.default_rng(1)
    with xr.open_zarr(Path(raw["run"]) / "forecast.zarr", consolidated=False) as one:
        members = one.expand_dims(number=np.arange(MEMBERS), axis=1)
        members = members.map(lambda field: field + field.copy(data=noise.normal(0, 0.4, field.shape)))
        members.astype(np.float32).to_zarr(run / "forecast.zarr", consolidated=False)
    return {**raw, "run": str(run), "data": {**raw["data"], "stats": str(Path(raw["run"]) / "stats.nc")}}


@pytest.fixture(scope="module")
def of_ensemble(ensemble) -> Scores:
    return score(parse_config(ensemble))


def members_of(ensemble: dict, channel: str, lead: int) -> xr.DataArray:
    variable, level = CHANNELS[channel]
    with xr.open_zarr(Path(ensemble["run"]) / "forecast.zarr", consolidated=False) as forecasts:
        field = forecasts[variable].isel(lead_time=lead)
        values = (field if level is None else field.sel(level=level)).values.astype(np.float64)
    return xr.DataArray(values, dims=("start", "number", "latitude", "longitude"))


@pytest.mark.parametrize("channel", CHANNELS)
def test_scores_of_an_ensemble_are_those_of_the_scores_library(raw, ensemble, of_ensemble, channel) -> None:
    """RMSE and bias are of its mean, CRPS is the fair one; spread by its formula, power by members."""
    library, found = pytest.importorskip("scores"), of_ensemble
    assert found.members == MEMBERS
    weight, column = xr.DataArray(area(raw), dims="latitude"), found.channels.index(channel)
    for lead in (0, 3):
        members, others = members_of(ensemble, channel, lead), fields_of(raw, channel, lead)
        others = {name: xr.DataArray(field, dims=("start", "latitude", "longitude")) for name, field in others.items()}
        truth, at = others["truth"], (0, lead, column)
        mean = members.mean("number")
        assert found.rmse[at] == pytest.approx(float(library.continuous.rmse(mean, truth, weights=weight)), rel=1e-6)
        crps = library.probability.crps_for_ensemble(members, truth, "number", method="fair", weights=weight)
        assert found.crps[at] == pytest.approx(float(crps), rel=1e-6)
        for f, name in ((1, "persistence"), (2, "climatology")):
            error = float(library.continuous.mae(others[name], truth, weights=weight))
            assert found.crps[f, lead, column] == pytest.approx(error, rel=1e-6)
        spread = float(members.var("number", ddof=1).weighted(weight).mean()) ** 0.5
        assert found.spread[lead, column] == pytest.approx(spread, rel=1e-9)
        power = float((members**2).weighted(weight).mean())
        assert found.power[1, lead, column].sum() == pytest.approx(power, rel=1e-9)


def test_of_one_state_the_crps_is_the_absolute_error_and_there_is_no_spread(raw, found) -> None:
    fields = fields_of(raw, "b", 2)
    weight = (area(raw) / area(raw).sum())[None, :, None] / fields["truth"].shape[-1] / len(STARTS)
    error = float((np.abs(fields["model"] - fields["truth"]) * weight).sum())
    assert found.crps[0, 2, found.channels.index("b")] == pytest.approx(error, rel=1e-6)
    assert not found.spread.any()
    assert found.members == 1


def test_what_is_shown_of_an_ensemble(ensemble, of_ensemble, capsys) -> None:
    config, found = parse_config(ensemble), of_ensemble
    show_scores(config, found)
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("CRPS model persistence   spread")
    assert f"{found.crps[0, 3, 0]:.4g}" in table[2]
    assert f"{found.spread[3, 0]:.4g}" in table[2]
    for name in ("scores.png", "map.png", "spectra.png"):
        assert_not_blank(config.run / name)
    with (config.run / "scores.csv").open() as stream:
        row = next(csv.DictReader(stream))
    assert float(row["crps"]) == pytest.approx(found.crps[0, 0, 0], rel=1e-6)
    assert float(row["spread"]) == pytest.approx(found.spread[0, 0], rel=1e-6)


def scored(raw: dict, rank: int, ranks: int) -> Scores:
    return score(parse_config(raw), rank, ranks)


def scored_by_ranks(raw: dict, apart: int = 0) -> Scores:
    import torch.distributed as dist

    if dist.get_rank() == apart:
        raw = {**raw, "run": "nowhere"}
    return scored(raw, dist.get_rank(), dist.get_world_size())


def test_ranks_that_share_the_starts_get_the_scores_of_one(worlds, raw, found) -> None:
    for ranks in (3, 8):  # of four starts
        for other in worlds(ranks).run(scored_by_ranks, raw, -1):
            assert other.starts == found.starts == 4
            for name in ("rmse", "bias", "acc", "crps", "spread", "power"):
                np.testing.assert_allclose(getattr(other, name), getattr(found, name), rtol=1e-9, err_msg=name)
    with pytest.raises(RankError, match=r"scoring failed on rank 1: there is no forecast at nowhere") as caught:
        worlds(3).run(scored_by_ranks, raw, 1)
    assert len(caught.value.errors) == 3


def test_what_is_shown(raw, found, capsys) -> None:
    config = parse_config(raw)
    show_scores(config, found)
    table, made = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert len(table.splitlines()) == 1 + 3 * 2  # the first lead, and a day
    assert f"{found.bias[0, 3, 2]:.2g}" in table
    assert {Path(path).name for path in made.split()} == {
        *("scores.csv", "spectra.csv", "map.png", "scores.png", "spectra.png")
    }
    for path in made.split()[2:]:
        assert_not_blank(Path(path))
    with (config.run / "scores.csv").open() as stream:
        rows = {(row["channel"], row["lead_hours"], row["forecast"]): row for row in csv.DictReader(stream)}
    assert float(rows["c_850", "18", "persistence"]["bias"]) == pytest.approx(found.bias[1, 2, 2], rel=1e-6)
    with (config.run / "spectra.csv").open() as stream:
        last = list(csv.DictReader(stream))[-1]
    assert (last["channel"], last["lead_hours"], last["wavenumber"]) == ("c_850", "24", "8")
    assert float(last["model"]) == pytest.approx(found.power[1, 3, 2, 8], rel=1e-6)
