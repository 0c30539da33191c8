"""resumed == uninterrupted, on the same mesh and on another; forecasts and scores are those of one process."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.data.store import FieldStore
from credit.errors import CreditError
from credit.launch.job import start_job
from credit.parallel.checkpoint import list_checkpoints
from credit.training import forecast as forecasting
from credit.training import setup
from credit.training import train as training
from credit.training.score import score
from tests.stores import conf, dataset, write_zarr
from tests.training.test_parity import curve


class Killed(Exception):
    pass


def interrupted(raw: dict, at: int) -> None:
    """Train until step `at` has been taken, then die without warning."""
    real = training.TrainingRun.train_step

    def step_or_die(self, batch, step):
        if step == at:
            raise Killed
        return real(self, batch, step)

    training.TrainingRun.train_step = step_or_die
    try:
        curve(raw)
    except Killed:
        pass
    finally:
        training.TrainingRun.train_step = real


def serially(function, *args) -> list:
    return [function(*args)]


@pytest.fixture
def raw(tmp_path) -> dict:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), dtype="float64", checkpoint_every=3)
    raw["data"]["stats"] = str(tmp_path / "stats.nc")
    write_statistics(parse_config(raw))
    return raw


def on(raw: dict, run: Path, data: str, domain: int) -> dict:
    parallelism = {"data": data, "tensor": 1, "domain": domain}
    return {**raw, "run": str(run), "trainer": {**raw["trainer"], "parallelism": parallelism}}


@pytest.mark.parametrize(
    ("before", "at", "after", "rel"),
    [
        ((2, "ddp", 2), 3, (2, "ddp", 2), 0),  # the same mesh: bitwise
        ((2, "fsdp2", 2), 8, (2, "fsdp2", 2), 0),
        ((4, "fsdp2", 2), 5, (1, "none", 1), 1e-9),
        ((1, "none", 1), 5, (4, "fsdp2", 2), 1e-9),
        ((4, "ddp", 2), 8, (3, "none", 3), 1e-9),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(worlds, raw, tmp_path, before, at, after, rel) -> None:
    """Ten steps, checkpoints at 3, 6 and 9; killed before step `at` + 1, resumed on another mesh."""
    on_mesh = worlds(before[0]).run if rel == 0 else serially
    whole, whole_valid, _ = on_mesh(curve, on(raw, tmp_path / "whole", *(before[1:] if rel == 0 else ("none", 1))))[0]
    worlds(before[0]).run(interrupted, on(raw, tmp_path / "cut", *before[1:]), at)
    rest, rest_valid, _ = worlds(after[0]).run(curve, on(raw, tmp_path / "cut", *after[1:]))[0]
    assert len(whole) == 10
    assert len(rest) == 10 - at // 3 * 3
    assert rest == pytest.approx(whole[-len(rest) :], rel=rel, abs=0)
    assert rest_valid == pytest.approx(whole_valid, rel=rel, abs=0)
    with (tmp_path / "cut" / "log.csv").open() as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream)] == list(range(1, 11))


def test_the_last_two_checkpoints_are_kept_and_partial_ones_ignored(raw, tmp_path) -> None:
    curve(raw)
    directory = tmp_path / "run" / "checkpoints"
    (directory / "step-00000099").mkdir()
    assert [path.name for path in list_checkpoints(directory)] == ["step-00000009", "step-00000010"]
    losses, *_ = curve(raw)
    assert losses == []


def forecast_on(raw: dict) -> None:
    """Ranks other than the first write slowly: none of them may find the store completed under its hands."""
    real = forecasting._write

    def write(*args) -> None:
        time.sleep(0.1 if dist.is_initialized() and dist.get_rank() else 0)
        real(*args)

    forecasting._write = write
    try:
        with start_job(lambda: parse_config(raw)) as job:
            forecasting.forecast(job)
    finally:
        forecasting._write = real


@pytest.fixture
def trained(raw):
    curve(raw)
    return raw


def test_a_forecast_on_the_mesh_is_that_of_one_process(worlds, trained, tmp_path) -> None:
    forecast_on(trained)
    with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
        serial = store.load()
    assert serial.sizes == {"init_time": 6, "lead_time": 4, "latitude": 13, "longitude": 16}
    assert np.isfinite(serial.to_array()).all()
    assert serial.attrs["Conventions"] == "CF-1.10"
    for size, data, domain in ((2, "none", 2), (4, "fsdp2", 2), (4, "ddp", 1)):
        worlds(size).run(forecast_on, on(trained, tmp_path / "run", data, domain))
        with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
            xr.testing.assert_allclose(store.load(), serial, rtol=1e-6)


def test_scores_are_those_of_a_plain_calculation(trained, tmp_path) -> None:
    forecast_on(trained)
    scores = score(parse_config(trained))
    truth, climatology = dataset(), dataset().isel(time=slice(0, 24)).mean("time")
    with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
        predicted = store.load()
    area = xr.DataArray(FieldStore(tmp_path / "s.zarr").grid.latitude_weights(), dims="latitude")
    for lead, hours in enumerate((6, 12, 18, 24)):
        starts = predicted.init_time.values
        verified = truth.b.sel(time=starts + np.timedelta64(hours, "h")).astype(float).drop_vars("time")
        model = predicted.b.isel(lead_time=lead).astype(float).rename(init_time="time")
        still = truth.b.sel(time=starts).astype(float).drop_vars("time")
        mean = (("latitude", "longitude"), area)
        for f, candidate in enumerate((model, still, climatology.b)):
            rmse = float((((candidate - verified) ** 2).weighted(area).mean(mean[0])).mean() ** 0.5)
            assert scores.rmse[f, lead, 1] == pytest.approx(rmse, rel=1e-5)
        anomaly, of_model = verified - climatology.b, model - climatology.b
        product, ours, theirs = (
            (p).weighted(area).mean(mean[0]) for p in (of_model * anomaly, of_model**2, anomaly**2)
        )
        assert scores.acc[0, lead, 1] == pytest.approx(float((product / (ours * theirs) ** 0.5).mean()), rel=1e-4)
    assert "b            24 h" in scores.table()


def test_a_loss_that_is_not_finite_ends_the_run(worlds, raw) -> None:
    raw["trainer"].update(learning_rate=1e30, clip=None, dtype="float32")
    with pytest.raises(CreditError, match=r"the loss is (nan|inf) at step \d+: lower trainer.learning_rate"):
        curve(raw)


def test_every_rank_starts_from_the_same_weights_or_none_does(worlds, raw, tmp_path) -> None:
    with pytest.raises(Exception, match=r"initial weights on ranks \[1\] differ from rank 0's"):
        worlds(2).run(unseeded, on(raw, tmp_path / "run", "none", 2))


def unseeded(raw: dict) -> None:
    real = setup.build_model

    def build(*args):
        model = real(*args)
        with torch.no_grad():
            model.stem.conv.weight += dist.get_rank()
        return model

    setup.build_model = build
    try:
        curve(raw)
    finally:
        setup.build_model = real
