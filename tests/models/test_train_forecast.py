"""Training and forecasts of the shipped models on a mesh == those of one process, at heights that nothing divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.evaluation.forecast import forecast
from credit.launch.job import start_job
from credit.models import build_model
from credit.training.train import TrainingRun, train
from tests.stores import conf, dataset, write_zarr

HEIGHTS = (181, 721)
MODELS: dict[str, dict[str, Any]] = {
    "wxformer": {
        **{"widths": [8, 16], "depths": [1, 1], "kernels": [[4, 8, 16, 32], [2, 4]], "strides": [2, 2]},
        **{"local_window": 3, "global_windows": [2, 3], "head_width": 4, "ratio": 2, "groups": 2, "padding": 4},
        "spectral_norm": True,
    },
    "unet_diffusion": {"width": 4, "levels": 2, "groups": 2, "heads": 2},
    "pangu": {
        **{"upper": 1, "levels": 2, "width": 8, "depth": 2, "coarse_depth": 2, "heads": 2},
        **{"window": [2, 3, 2], "patch": [2, 2, 2]},
    },
}
MESHES = [
    (181, "none", 1, 1, 3),
    (181, "fsdp2", 2, 2, 2),
    (721, "ddp", 1, 2, 2),
    pytest.param((721, "none", 1, 1, 4), marks=pytest.mark.slow),
]
"""(height, data, dp, tp, domain)"""


def small(folder: Path, name: str, height: int) -> dict[str, Any]:
    """Two steps of training, and forecasts of two steps from four starts."""
    raw = conf(folder / "run", folder.parent / f"{height}.zarr")
    raw["data"].update(variables=["c", "a"], levels=[500, 850], stats=str(folder.parent / f"{height}.nc"))
    raw["data"].update(train=["2020-01-01", "2020-01-02 06:00"], valid=["2020-01-02 06:00", "2020-01-03"])
    raw["data"].update(test=["2020-01-03", "2020-01-04"])
    raw["model"] = {"name": name, **MODELS[name]}
    raw["trainer"].update(epochs=1, batch_size=2, dtype="float64", clip=0.1)
    raw["forecast"] = {"lead": "12h"}
    return raw


def train_and_forecast(raw: dict[str, Any]) -> tuple[list[float], float | None, list[float]]:
    """(losses, validation loss, gradient norms), and forecast.zarr in the run directory."""
    with start_job(lambda: parse_config(raw)) as job:
        trained = train(job)
        forecast(job)
    return trained.losses, trained.valid_loss, trained.gradient_norms


def forecasts(folder: Path) -> dict[str, np.ndarray]:
    with xr.open_zarr(folder / "run" / "forecast.zarr", consolidated=False) as store:
        return {str(name): array.values for name, array in store.data_vars.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for height in HEIGHTS:
        write_zarr(folder / f"{height}.zarr", dataset(16, (height, 16), (500.0, 850.0)), rows_per_chunk=height)
        write_statistics(parse_config(small(folder / "any", "pangu", height)))
    return folder


@pytest.fixture(scope="module")
def serial(store) -> dict[tuple[str, int], tuple[Any, dict[str, np.ndarray]]]:
    found = {}
    for name in MODELS:
        for height in HEIGHTS:
            folder = store / f"{name}-{height}"
            found[name, height] = train_and_forecast(small(folder, name, height)), forecasts(folder)
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_forecasts_as_on_one_device(worlds, serial, store, tmp_path, name: str, mesh: tuple) -> None:
    height, data, dp, tp, domain = mesh
    (losses, valid, norms), wanted = serial[name, height]
    raw = small(store / "on-a-mesh", name, height)
    raw["run"] = str(tmp_path / "run")
    raw["trainer"]["parallelism"] = {"data": data, "tensor": tp, "domain": domain}
    for ours, ours_valid, our_norms in worlds(dp * tp * domain).run(train_and_forecast, raw):
        assert len(ours) == 2
        assert ours == pytest.approx(losses, rel=1e-9)
        assert ours_valid == pytest.approx(valid, rel=1e-9)
        assert our_norms == pytest.approx(norms, rel=1e-8)
    for variable, values in forecasts(tmp_path).items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, wanted[variable], rtol=3e-7)  # stored in float32


class Operators(TorchDispatchMode):
    """The names of all that are run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    with Operators() as seen:
        model(x).square().mean().backward()
    return seen.names


@pytest.mark.parametrize("data", ["none", "ddp", "fsdp2"])
@pytest.mark.parametrize("name", MODELS)
def test_on_one_device_nothing_is_run_but_the_model(store, tmp_path, name: str, data: str) -> None:
    raw = small(store / "on-a-mesh", name, 181)
    raw["run"] = str(tmp_path / "run")
    raw["trainer"]["parallelism"] = {"data": data, "tensor": 1, "domain": 1}
    with start_job(lambda: parse_config(raw)) as job:
        model = TrainingRun(job).model
    plain = build_model(parse_config(raw).model, 6, 3, (181, 16)).double()
    x = torch.randn(1, 6, 181, 16, dtype=torch.float64)
    wanted, found = operators(plain, x), operators(model, x)
    assert len(wanted) > 100
    assert found == wanted
