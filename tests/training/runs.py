"""Small training runs for tests: made, cut short, and looked at. Light to import, as every rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from credit.config import parse_config
from credit.data.dataset import Fields
from credit.data.prepare import load_fields_statistics, open_fields, write_statistics
from credit.evaluation.export import export
from credit.launch.job import start_job
from credit.parallel.checkpoint import get_model_state_dict
from credit.parallel.pieces import in_pieces, whole
from credit.training import train as training
from tests.stores import conf, dataset, write_zarr


def small(folder: Path) -> dict[str, Any]:
    """A run of ten steps in two epochs, with checkpoints at 3, 6, 9 and 10."""
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", dataset()), dtype="float64", checkpoint_every=3)
    raw["data"]["stats"] = str(folder / "stats.nc")
    write_statistics(parse_config(raw))
    return raw


def with_transformer(raw: dict[str, Any]) -> dict[str, Any]:
    raw["model"] = {"name": "transformer", "width": 16, "depth": 2, "heads": 4, "window": 2, "ratio": 2}
    raw["trainer"].update(ema=0.8, batch_size=4, epochs=2)
    return raw


def on(raw: dict[str, Any], run: Path, data: str, domain: int, tensor: int = 1) -> dict[str, Any]:
    """The run in another directory and on another mesh."""
    parallelism = {"data": data, "tensor": tensor, "domain": domain}
    return {**raw, "run": str(run), "trainer": {**raw["trainer"], "parallelism": parallelism}}


def curve(raw: dict[str, Any]) -> tuple[list[float], float | None, list[float]]:
    """(loss of each step, last validation loss, gradient norm of each step), as this rank sees them."""
    with start_job(lambda: parse_config(raw)) as job:
        trained = training.train(job)
    return trained.losses, trained.valid_loss, trained.gradient_norms


def losses_and_weights(raw: dict[str, Any]) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of each step taken, and at the end the plain weights and averages."""
    with start_job(lambda: parse_config(raw)) as job:
        trained = training.train(job)
        pieces = in_pieces(trained.model, get_model_state_dict(trained.model))
        state = {name: whole(value).detach().numpy().copy() for name, value in pieces.items()}
    return trained.losses, state


def exported(raw: dict[str, Any], path: Path) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        export(job, path)


class Killed(Exception):
    pass


def interrupted(raw: dict[str, Any], at: int) -> None:
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


def same_rest(found: tuple, whole: tuple) -> None:
    """(losses, weights) of a run that went on are those of the whole one, to the rounding of float64."""
    (rest, values), (losses, weights) = found, whole
    np.testing.assert_allclose(rest, losses[-len(rest) :], rtol=1e-8)
    for name, value in weights.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


def fields_of(raw: dict[str, Any], rows: range = range(13)) -> Fields:
    config = parse_config(raw)
    store = open_fields(config)
    return Fields(config, store, load_fields_statistics(config, store), rows)
