"""Forecasts on a mesh are those of one process, and who writes which latitudes of them; their scores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor

from credit.config import parse_config
from credit.data.store import FieldStore
from credit.domain_parallel import DomainParallelManager, shard_tensor
from credit.errors import CreditError
from credit.evaluation import forecast as forecasting
from credit.evaluation.forecast import Chunk
from credit.evaluation.score import score
from credit.launch.job import start_job
from credit.layout import MeshShape
from tests.stores import dataset
from tests.training.runs import curve, on, small


def moved(latitudes: int) -> tuple[range, Tensor, int]:
    """This rank's chunk of a field of row numbers: (rows asked for, what came, bytes sent)."""
    manager = DomainParallelManager(dist.get_world_size(), dist.get_world_size())
    coords = MeshShape(0, 0, manager.domain_rank)
    job: Any = SimpleNamespace(shape=MeshShape(1, 1, manager.domain_world_size), coords=coords, manager=manager)
    chunk = Chunk(latitudes, job)
    slab = shard_tensor(torch.arange(float(latitudes))[:, None].expand(-1, 2), manager=manager)
    return chunk.rows, chunk.of(slab), manager.traffic.bytes


@pytest.mark.parametrize("latitudes", [4, 5, 6, 13, 31, 181])
def test_chunks_are_equally_high_and_made_by_moving_few_rows(worlds, latitudes) -> None:
    for ranks in (1, 3, 4):
        found = worlds(ranks).run(moved, latitudes)
        heights = [len(rows) for rows, _, _ in found]
        assert heights[: latitudes // heights[0]] == [heights[0]] * (latitudes // heights[0])
        assert sum(heights) == latitudes
        for rows, piece, sent in found:
            assert piece[:, 0].tolist() == list(rows)
            assert sent <= (ranks - 1) * 2 * 4


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """A run that is trained, and has forecast, in one process."""
    raw = small(tmp_path_factory.mktemp("trained"))
    raw["trainer"]["epochs"] = 1
    raw["forecast"]["every"] = 2  # three starts: two or four replicas have not the same number
    curve(raw)
    forecast_on(raw)
    return raw


def made(raw: dict) -> xr.Dataset:
    with xr.open_zarr(Path(raw["run"]) / "forecast.zarr", consolidated=False) as store:
        return store.load()


def test_a_forecast_on_the_mesh_is_that_of_one_process(worlds, trained, tmp_path) -> None:
    serial = made(trained)
    assert serial.sizes == {"init_time": 3, "lead_time": 4, "latitude": 13, "longitude": 16}
    assert np.isfinite(serial.to_array()).all()
    assert serial.attrs["Conventions"] == "CF-1.10"
    shutil.copytree(Path(trained["run"]) / "checkpoints", tmp_path / "checkpoints")
    for size, data, domain, rows in ((2, "none", 2, 7), (4, "fsdp2", 2, 7), (4, "ddp", 1, 13), (4, "none", 4, 4)):
        on_mesh = on(trained, tmp_path, data, domain)
        worlds(size).run(forecast_on, on_mesh)
        found = made(on_mesh)
        assert found.b.encoding["chunks"] == (1, 1, rows, 16)
        xr.testing.assert_allclose(found, serial, rtol=1e-6)
    for number in (4, "auto"):
        on_slices = on(trained, tmp_path, "none", 1)
        on_slices["trainer"]["slices"] = number
        forecast_on(on_slices)
        xr.testing.assert_allclose(made(on_slices), serial, rtol=1e-6)


def test_scores_are_those_of_a_plain_calculation(trained) -> None:
    scores = score(parse_config(trained))
    truth, climatology = dataset(), dataset().isel(time=slice(0, 24)).mean("time")
    predicted = made(trained)
    area = xr.DataArray(FieldStore(Path(trained["data"]["path"])).grid.latitude_weights(), dims="latitude")
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


def test_a_forecast_that_is_not_finite_is_no_forecast(worlds, trained, tmp_path, monkeypatch) -> None:
    raw = on(trained, Path(trained["run"]), "none", 1)
    before = (Path(trained["run"]) / "forecast.zarr/zarr.json").stat().st_mtime_ns
    real = forecasting.roll_out

    def diverging(*args, **kwargs):
        for lead, state in enumerate(real(*args, **kwargs)):
            yield state if lead < 1 else state * float("nan")

    monkeypatch.setattr(forecasting, "roll_out", diverging)
    with pytest.raises(CreditError, match=r"the forecast is not finite from 2020-01-\S+ \+ 12 h on: "):
        forecast_on(raw)
    assert (Path(trained["run"]) / "forecast.zarr/zarr.json").stat().st_mtime_ns == before
