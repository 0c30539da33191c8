"""More epochs for a finished run, schedules, the best checkpoint, early stopping."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from credit.config import parse_config
from credit.errors import ConfigError, CreditError
from credit.evaluation.forecast import forecast
from credit.launch.job import start_job
from credit.parallel.checkpoint import list_checkpoints
from credit.parallel.validated import read_losses
from credit.status import read_status
from credit.training.schedule import Schedule
from tests.training.runs import curve, interrupted, losses_and_weights, on, same_rest, small


def halves(done: float) -> float:
    """A schedule of a user's own."""
    return 0.5**done


def upside_down(done: float) -> float:
    return done - 1


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return on(small(tmp_path), tmp_path / "run", "none", 1)


def rates(run: Path) -> list[float]:
    with (run / "log.csv").open() as stream:
        return [float(row["learning_rate"]) for row in csv.DictReader(stream)]


def trainer(raw: dict[str, Any], **values: Any) -> Any:
    return parse_config({**raw, "trainer": {**raw["trainer"], **values}}).trainer


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1.0),
        (f"{__name__}.halves", halves),
    ],
)
def test_a_schedule_is_a_warm_up_and_a_factor_of_what_is_done(raw, name, factor) -> None:
    schedule = Schedule(trainer(raw, schedule=name, warmup_steps=3, learning_rate=0.1), [2, 5], 5)
    wanted = []
    for steps in (10, 15):
        wanted += [0.1 * (step + 1) / 3 for step in range(3)]
        wanted += [0.1 * factor((step - 3) / (steps - 3)) for step in range(3, steps)]
    assert [schedule.rate(step) for step in range(25)] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cosin", "trainer.schedule: 'cosin' is neither one of cosine, linear, constant nor a dotted path"),
        (f"{__name__}.upside_down", r"gives the factors \[-1.0, -0.5, 0.0\]"),
        ("math.pi", "must take the part of the steps that is done"),
        ("math.no", "trainer.schedule: math has no no"),
    ],
)
def test_what_is_no_schedule_is_refused(raw, name, said) -> None:
    with pytest.raises(ConfigError, match=said):
        Schedule(trainer(raw, schedule=name), [1], 5)


def test_epochs_are_added_to_a_finished_run_and_to_no_other(worlds, raw, tmp_path) -> None:
    """The added ones begin with the whole schedule, and are the same if the run is killed among them."""
    raw["trainer"]["warmup_steps"] = 2
    more = {**raw, "trainer": {**raw["trainer"], "epochs": 4}}
    for folder in ("whole", "cut"):
        interrupted(on(raw, tmp_path / folder, "none", 1), 7)
        with pytest.raises(CreditError, match=r"trainer.epochs was 2 and is 4, and the run is at epoch 1: .*Finish it"):
            curve(on(more, tmp_path / folder, "none", 1))
        first, _ = losses_and_weights(on(raw, tmp_path / folder, "none", 1))
        assert len(first) == 4
    losses, weights = losses_and_weights(on(more, tmp_path / "whole", "none", 1))
    assert len(losses) == 10
    logged = rates(tmp_path / "whole")
    assert logged[10:] == pytest.approx(logged[:10])  # as many epochs: the same rates again
    worlds(2).run(interrupted, on(more, tmp_path / "cut", "fsdp2", 1), 17)
    for found in worlds(2).run(losses_and_weights, on(more, tmp_path / "cut", "none", 2)):
        same_rest(found, (losses, weights))
    with pytest.raises(CreditError, match=r"trainer\.epochs was 4 and is 2"):
        curve(on(raw, tmp_path / "whole", "none", 1))


def test_the_best_checkpoint_is_kept_and_can_be_forecast_from(worlds, raw, tmp_path) -> None:
    """A learning rate that is far too high from some step on: the newest is not the best."""
    raw["trainer"] |= {"epochs": 4, "schedule": f"{__name__}.explodes", "learning_rate": 1e-3, "keep": 1}
    raw["trainer"]["clip"] = None
    curve(raw)
    with (tmp_path / "run" / "valid.csv").open() as stream:
        valid = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(stream)}
    best = min(valid, key=lambda step: valid[step])
    assert best < 20
    directory = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(directory)] == [f"step-{best:08d}", "step-00000020"]
    assert read_losses(directory) == valid
    for choice, step in (("best", best), ("newest", 20)):
        raw["forecast"]["checkpoint"] = choice
        with start_job(lambda: parse_config(raw)) as job:
            path = forecast(job)
        assert f"checkpoint step-{step:08d}" in json.loads((path / "zarr.json").read_text())["attributes"]["source"]
    worlds(2).run(curve, on(raw, tmp_path / "run", "none", 2))  # is finished, and stays so
    assert [path.name for path in list_checkpoints(directory)] == [f"step-{best:08d}", "step-00000020"]
    file = directory / "validated.json"
    file.write_text(file.read_text().replace(str(valid[best])[:6], "9.9999"))
    raw["forecast"]["checkpoint"] = "best"
    with (
        start_job(lambda: parse_config(raw)) as job,
        pytest.raises(CreditError, match=r"validated.json is damaged .*: remove"),
    ):
        forecast(job)


def explodes(done: float) -> float:
    return 1.0 if done < 0.4 else 300.0


def test_training_ends_once_validation_has_not_got_better(raw, tmp_path, capfd) -> None:
    raw["trainer"] |= {"epochs": 6, "schedule": f"{__name__}.explodes", "patience": 2, "clip": None}
    losses, *_ = curve(raw)
    with (tmp_path / "run" / "valid.csv").open() as stream:
        valid = [float(row["loss"]) for row in csv.DictReader(stream)]
    best = int(np.argmin(valid))
    assert len(valid) == best + 3 < 6
    assert len(losses) == 5 * len(valid)
    assert read_status(tmp_path / "run") == (f"{tmp_path / 'run'}: finished, step {len(losses)} of 30", 0)
    assert (
        f"no validation loss below that of step {5 * (best + 1)} for 2 epochs: training ends" in capfd.readouterr().out
    )
    assert curve(raw)[0] == []  # again: it is finished
