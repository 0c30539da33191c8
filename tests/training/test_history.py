"""Several input states, and variables that are predicted and not given: in samples, rollouts, runs and forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from credit.checks.parity import model_shape
from credit.config import parse_config
from credit.data.dataset import StepDataset
from credit.data.prepare import write_statistics
from credit.data.sampler import Draw
from credit.evaluation.forecast import forecast
from credit.evaluation.score import score
from credit.launch.job import start_job
from credit.training.rollout import changes
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve, fields_of, interrupted, losses_and_weights, on, same_rest

STEP = np.timedelta64(6, "h")


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """`a` is the state, `b` is diagnostic; three states are given."""
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), dtype="float64")
    raw["data"] |= {"variables": ["a"], "diagnostics": ["b"], "history": 3, "stats": str(tmp_path / "stats.nc")}
    write_statistics(parse_config(raw))
    return raw


def test_samples_hold_the_states_before_and_the_diagnostics_themselves(raw, tmp_path) -> None:
    raw["trainer"]["rollout"] = 2
    fields = fields_of(raw)
    batch = StepDataset(fields, "train").__getitems__([Draw(0, 1.0), Draw(5, 1.0)])
    with xr.open_zarr(tmp_path / "s.zarr", consolidated=False) as store, xr.open_dataset(raw["data"]["stats"]) as stats:
        mean, std = (stats[name].to_series() for name in ("mean", "std"))
        a = ((store["a"] - mean["a"]) / std["a"]).load()
        b = ((store["b"] - mean["b"]) / std["b"]).load()
        change = float(stats["increment_std"].sel(predicted="a") / std["a"])
    for i, seconds in enumerate(batch["time"].tolist()):
        start = np.datetime64(seconds, "s")
        assert start >= np.datetime64("2020-01-01T12")  # the states before it are of the period, too
        for back in range(3):
            np.testing.assert_allclose(batch["x"][i, back], a.sel(time=start - back * STEP), atol=1e-6)
        for lead in (1, 2):
            wanted = (a.sel(time=start + lead * STEP) - a.sel(time=start)) / change
            np.testing.assert_allclose(batch["y"][i, lead - 1, 0], wanted, atol=1e-4)
            np.testing.assert_allclose(batch["y"][i, lead - 1, 1], b.sel(time=start + lead * STEP), atol=1e-6)
    config = parse_config(raw)
    assert model_shape(config) == (batch["x"].shape[1], 2, (13, 16)) == (fields.input_channels, 2, (13, 16))


def test_a_rollout_shifts_the_states_and_carries_no_diagnostic() -> None:
    """Of a model whose change is the oldest state that it has, and whose diagnostic is the newest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3 + 2, 4, 5, generator=generator, dtype=torch.float64)  # 3 states, a forcing, a static
    batch = {"x": x, "y": torch.zeros(2, 3, 2, 4, 5), "forcings": torch.zeros(2, 2, 1, 4, 5, dtype=torch.float64)}
    unit = torch.tensor([0.5, 1.0], dtype=torch.float64)[:, None, None]
    made = [*changes(lambda inputs: inputs[:, [2, 0]], batch, (1, 3), unit, detach=False)]
    now, before, oldest = x[:, 0], x[:, 1], x[:, 2]
    first = now + oldest * 0.5
    second = first + before * 0.5
    wanted = [(oldest, now), (oldest + before, first), (oldest + before + now, second)]
    for (change, diagnostic), step in zip(wanted, made, strict=True):
        torch.testing.assert_close(step, torch.stack([change, diagnostic], dim=1))


@pytest.mark.parametrize(("data", "dp", "tensor", "domain"), [("fsdp2", 2, 1, 2), ("ddp", 1, 2, 2)])
def test_a_run_is_that_of_one_process_and_goes_on(worlds, raw, tmp_path, data, dp, tensor, domain) -> None:
    raw["trainer"] |= {"rollout": 2, "loss": {"kind": "mae", "variables": {"b": 2.0}}}
    if tensor > 1:
        raw["model"] = {"name": "transformer", "width": 16, "depth": 1, "heads": 4, "window": 2}
    losses, weights = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    cut = on(raw, tmp_path / "cut", data, domain, tensor)
    worlds(dp * tensor * domain).run(interrupted, cut, 7)
    for found in worlds(dp * tensor * domain).run(losses_and_weights, cut):
        same_rest(found, (losses, weights))


def forecast_of(raw: dict[str, Any]) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        forecast(job)


def test_a_forecast_is_that_of_one_process_and_starts_from_all_states(worlds, raw, tmp_path) -> None:
    curve(raw)
    forecast_of(raw)
    with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
        alone = store.load()
    worlds(2).run(forecast_of, on(raw, tmp_path / "run", "none", 2))
    with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
        xr.testing.assert_allclose(store.load(), alone, rtol=1e-6)
    assert alone.init_time.values[0] == np.datetime64("2020-01-09T00")  # of a period that begins twelve hours before
    assert set(alone.data_vars) == {"a", "b"}
    scores = score(parse_config(raw))
    assert scores.channels == ["a", "b"]
    assert np.isfinite(scores.rmse).all()


def test_a_variable_has_one_role(raw) -> None:
    from credit.errors import ConfigError

    raw["data"]["forcings"] = ["b"]
    with pytest.raises(ConfigError, match=r"data: b is named twice \(in diagnostics, forcings\): a field has one role"):
        parse_config(raw)
    raw["data"] |= {"forcings": [], "levels": [500, 500.0]}
    with pytest.raises(ConfigError, match="levels name 500 twice"):
        parse_config(raw)
