"""A part of the globe: the area of its own cells, no way around, and a boundary that is given, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scores as judge
import torch
import xarray as xr
import yaml

from credit.checks.preflight import preflight
from credit.cli import main
from credit.config import parse_config
from credit.data.describe import describe
from credit.data.grid import Grid
from credit.data.prepare import write_statistics
from credit.domain_parallel import verify_parity
from credit.errors import CreditError
from credit.evaluation.forecast import forecast
from credit.evaluation.score import score
from credit.launch.job import start_job
from credit.models import DOMAIN_CONVERTERS, build_model
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import losses_and_weights, on

LATITUDE, LONGITUDE = np.linspace(60, 36, 13), np.linspace(-10, 20, 16)
BOUNDARY = 2


def region() -> xr.Dataset:
    data = dataset()
    return data.assign_coords(latitude=LATITUDE, longitude=LONGITUDE)


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", region()), dtype="float64", rollout=2, epochs=1)
    raw["data"] |= {"grid": "region", "boundary": BOUNDARY, "stats": str(tmp_path / "stats.nc")}
    write_statistics(parse_config(raw))
    return raw


def areas() -> np.ndarray:
    """(latitude, longitude), on the unit sphere."""
    bands = np.sin(np.deg2rad(LATITUDE + 1)) - np.sin(np.deg2rad(LATITUDE - 1))
    return np.tile(bands[:, None] * np.deg2rad(2), (1, 16))


def test_its_area_is_that_of_its_cells() -> None:
    grid = Grid(LATITUDE, LONGITUDE, region=True)
    box = (np.sin(np.deg2rad(61)) - np.sin(np.deg2rad(35))) * np.deg2rad(32)
    assert grid.row_areas().sum() == pytest.approx(box, rel=1e-12)
    np.testing.assert_allclose(grid.row_areas(), areas().sum(axis=1), rtol=1e-12)
    assert Grid(np.linspace(90, -90, 7), np.arange(8) * 45.0).row_areas().sum() == pytest.approx(4 * np.pi, rel=1e-12)
    weights = grid.cell_weights(BOUNDARY)
    inner = areas()[BOUNDARY:-BOUNDARY, BOUNDARY:-BOUNDARY]
    np.testing.assert_allclose(weights[BOUNDARY:-BOUNDARY, BOUNDARY:-BOUNDARY], inner / inner.sum(), rtol=1e-12)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert np.count_nonzero(weights) == inner.size


@pytest.mark.parametrize(("mesh"), [(2, "none", 2), (3, "none", 3), (4, "ddp", 2)])
def test_a_run_is_that_of_one_process(worlds, raw, tmp_path, mesh) -> None:
    ranks, data, domain = mesh
    losses, weights = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    for found, values in worlds(ranks).run(losses_and_weights, on(raw, tmp_path / "cut", data, domain)):
        np.testing.assert_allclose(found, losses, rtol=1e-9)
        for name, value in weights.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def forecast_of(raw: dict[str, Any]) -> Path:
    with start_job(lambda: parse_config(raw)) as job:
        return forecast(job)


def read(path: Path) -> xr.Dataset:
    with xr.open_zarr(path, consolidated=False) as store:
        return store.load()


def test_forecasts_are_given_the_boundary_and_scores_are_of_the_rest(worlds, raw, tmp_path) -> None:
    losses_and_weights(raw)
    made = read(forecast_of(raw))
    worlds(3).run(forecast_of, on(raw, tmp_path / "run", "none", 3))
    for name, values in read(tmp_path / "run" / "forecast.zarr").items():
        np.testing.assert_allclose(values, made[name], rtol=1e-6, err_msg=name)
    truth, found = region(), score(parse_config(raw))
    edge = np.ones((13, 16), bool)
    edge[BOUNDARY:-BOUNDARY, BOUNDARY:-BOUNDARY] = False
    weights = xr.DataArray(np.where(edge, 0, areas()), dims=("latitude", "longitude"))
    for lead in range(made.sizes["lead_time"]):
        ahead = made.isel(lead_time=lead)
        valid = ahead.init_time.values + made.lead_time.values[lead]
        there = truth.sel(time=valid).rename(time="init_time").assign_coords(init_time=ahead.init_time)
        for column, name in enumerate(("a", "b")):
            given, forecasts = there[name].values, ahead[name].values
            np.testing.assert_allclose(forecasts[:, edge], given[:, edge], rtol=1e-6)
            assert (forecasts[:, ~edge] != given[:, ~edge]).any()
            rmse = judge.continuous.rmse(ahead[name].astype(float), there[name].astype(float), weights=weights)
            assert found.rmse[0, lead, column] == pytest.approx(float(rmse), rel=1e-6)
    assert np.isnan(found.power).all()


def test_the_newest_start_is_the_last_whose_boundary_is_stored(raw) -> None:
    losses_and_weights(raw)
    raw["forecast"] = {"lead": "24h", "start": "latest"}
    made = read(forecast_of(raw))
    last = region().time.values[-1]
    assert made.init_time.values[0] + made.lead_time.values[-1] == last
    raw["forecast"]["start"] = str(last)[:16]
    with pytest.raises(CreditError, match=r"no state at .* and, for the boundary, up to 24 h after is stored"):
        forecast_of(raw)


@pytest.mark.parametrize("name", ["unet", "unet_diffusion"])
def test_models_do_not_go_around(raw, name) -> None:
    """A change in the easternmost column does not reach the westernmost; and cut by latitude, all is exact."""
    raw["model"] = {"name": name, "width": 4, "groups": 2, "levels": 1}
    torch.manual_seed(0)
    model = build_model(parse_config(raw).model, 3, 2, (13, 32), region=True).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 3, 13, 32, dtype=torch.float64)
    assert verify_parity(model, (x,), ranks=3, custom_converters=DOMAIN_CONVERTERS).exact
    local = torch.nn.Sequential(model.stem, model.head)
    changed = x.clone()
    changed[..., -1] += 1
    apart = (local(changed) - local(x)).abs().amax(dim=(0, 1, 2))
    assert not apart[:16].any()
    assert apart[-2:].all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"grid": None}}, "boundary: 2 is of the edges of a region"),
        ({"trainer": {"loss": {"spectral": 0.1}}}, "trainer.loss.spectral: waves are those around the globe"),
        ({"constraints": [{"name": "conserve", "terms": {"a": 1}, "adjust": "a"}]}, "conserve is of the globe"),
        ({"data": {"boundary": 7}}, "data.boundary: 7 leaves nothing of 13 x 16 points"),
        (
            {"model": {"name": "unet", "width": 4, "groups": 2, "levels": 3}},
            "model: 13 x 16 points cannot be halved 3 times and reflected at the sides",
        ),
        ({"model": {"name": "wxformer"}}, "model.name: wxformer joins the east to the west"),
    ],
)
def test_what_a_region_cannot_have_is_refused(raw, change, said) -> None:
    for block, values in change.items():
        raw[block] = {**raw[block], **values} if isinstance(values, dict) and block != "model" else values
    with pytest.raises(CreditError, match=said):
        losses_and_weights(raw)


def test_a_field_of_the_boundary_alone_is_refused(raw, tmp_path) -> None:
    data = region()
    data["b"] = data.b.where(data.latitude > LATITUDE[BOUNDARY])
    raw["data"] |= {"path": str(write_zarr(tmp_path / "edge.zarr", data)), "missing": {"b": "mask"}}
    write_statistics(parse_config(raw))
    with pytest.raises(CreditError, match=r"b has no value that counts: all lie in data\.boundary, or are missing"):
        losses_and_weights(raw)


def test_a_region_is_not_taken_for_the_globe_nor_the_globe_for_a_region(raw, tmp_path) -> None:
    store = raw["data"]["path"]
    with pytest.raises(CreditError, match=r"latitudes must run from pole to pole.*set data.grid: region"):
        losses_and_weights({**raw, "data": {**raw["data"], "grid": None, "boundary": 0}})
    assert "grid: region" in describe([store])
    globe = str(write_zarr(tmp_path / "globe.zarr", dataset()))
    assert "grid: region" not in describe([globe])
    jump = region().assign_coords(longitude=np.where(LONGITUDE < 0, LONGITUDE + 360, LONGITUDE))
    jump = str(write_zarr(tmp_path / "jump.zarr", jump))
    with pytest.raises(
        CreditError, match=r"longitudes of a region must be regular.*0 after 358\. Across a jump by 360"
    ):
        losses_and_weights({**raw, "data": {**raw["data"], "path": jump}})


def test_check_and_plan_know_of_regions(raw, tmp_path, capsys) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(raw))
    assert [one for one in preflight(str(config), [], 1) if one.severity == "error"] == []
    wide = [one for one in preflight(str(config), ["data.boundary=7"], 1) if one.severity == "error"]
    assert [(one.where, "leaves nothing of 13 x 16" in one.message) for one in wide] == [("data.boundary", True)]
    assert main(["plan", str(config), "--gpus", "2", "--gpu-memory", "40", "--grid", "19x36"]) == 2
    assert "--grid is of the globe, and data.grid is region" in capsys.readouterr().err
