"""Several steps from one sample: what a step is given, its gradient, and one curve on every mesh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from credit.checks.preflight import preflight
from credit.config import parse_config
from credit.data.dataset import StepDataset
from credit.data.sampler import Draw
from credit.errors import DataError
from credit.evaluation.forecast import roll_out
from credit.launch.job import start_job
from credit.training.rollout import changes
from credit.training.train import TrainingRun, train
from tests.training.runs import curve, fields_of, on, small, with_transformer

STEPS = 3


@pytest.fixture
def raw(tmp_path) -> dict:
    given = small(tmp_path)
    given["trainer"].update(rollout=STEPS, epochs=1)
    return given


def test_a_perfect_model_is_given_the_true_state_and_forcings_of_every_step(raw) -> None:
    fields = fields_of(raw)
    dataset = StepDataset(fields, "train")
    batch = dataset.__getitems__([Draw(4, 1.0), Draw(0, 1.0)])
    assert batch["y"].shape == (2, STEPS, 2, 13, 16)
    assert batch["forcings"].shape == (2, STEPS - 1, 1, 13, 16)
    assert len(dataset) == 24 - STEPS  # every start has all its targets within the period
    given: list[Tensor] = []

    def perfect(x: Tensor) -> Tensor:
        given.append(x)
        before = batch["y"][:, len(given) - 2] if len(given) > 1 else 0
        return batch["y"][:, len(given) - 1] - before

    made = torch.stack(list(changes(perfect, batch, (2, 1), fields.unit, detach=False)), dim=1)
    torch.testing.assert_close(made, batch["y"], rtol=0, atol=1e-6)
    for step, inputs in enumerate(given):
        times = dataset.starts[[4, 0]] + step
        wanted = torch.cat([fields.state(times.tolist()), fields.given(fields.store.times[times])], dim=1)
        torch.testing.assert_close(inputs, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_is_that_of_the_formula(detach) -> None:
    """For the model a x, in units where that of change is 1: after n steps x (1 + a)^n, of which the change."""
    x, a = 1.5, torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    batch = {name: torch.zeros(1, n, 1, 1, 1, dtype=torch.float64) for name, n in (("y", STEPS), ("forcings", 2))}
    batch["forcings"] = batch["forcings"][:, :, :0]
    batch["x"] = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    total = sum(changes(lambda inputs: a * inputs, batch, (1, 1), torch.ones(1, 1, 1, dtype=torch.float64), detach))
    total.backward()
    growth = 1 + a.item()
    assert total.item() == pytest.approx(sum(x * growth**n - x for n in (1, 2, 3)), rel=1e-12)
    joined, apart = sum(n * x * growth ** (n - 1) for n in (1, 2, 3)), sum(x * growth ** (n - 1) for n in (1, 2, 3))
    assert a.grad.item() == pytest.approx(apart if detach else joined, rel=1e-12)


def test_the_validation_loss_is_that_of_the_forecasts(raw) -> None:
    """Mean over starts, steps, channels and area of the squared error of what `credit forecast` makes."""
    with start_job(lambda: parse_config(raw)) as job:
        trained = train(job)
        fields = fields_of(raw)
        starts = StepDataset(fields, "valid").starts
        states = roll_out(trained.model, fields, starts, STEPS, job.device, torch.float64)
        area = torch.from_numpy(fields.store.grid.latitude_weights())[:, None]
        errors = [
            ((state - fields.state((starts + step + 1).tolist())) / fields.unit).square()
            for step, state in enumerate(states)
        ]
    assert trained.valid_loss == pytest.approx(float((torch.stack(errors) * area).mean()), rel=1e-5)


MESHES = [(2, "none", 2, 1), (4, "fsdp2", 2, 1), (2, "ddp", 1, 1), (2, "none", 1, 2)]
DETACHED = {"rollout_detach": True, "accumulate": 2}


@pytest.mark.parametrize(("more", "meshes"), [({}, MESHES), (DETACHED, MESHES[:2])], ids=["joined", "detached"])
def test_every_mesh_gives_the_curve_of_one_process(worlds, raw, tmp_path, more, meshes) -> None:
    """Gradient norms too. The 13 latitudes are uneven over 2 ranks."""
    given = with_transformer(raw)
    given["trainer"].update(more, epochs=1)
    losses, valid, norms = curve(on(given, tmp_path / "alone", "none", 1))
    assert len(losses) == 5
    for size, data, domain, tensor in meshes:
        mesh = on(given, tmp_path / f"{size}{data}{domain}", data, domain, tensor)
        for found in worlds(size).run(curve, mesh):
            assert found[0] == pytest.approx(losses, rel=1e-9, abs=0)
            assert found[1] == pytest.approx(valid, rel=1e-9, abs=0)
            assert found[2] == pytest.approx(norms, rel=1e-8, abs=0)


def test_detached_steps_with_a_backward_each_are_the_detached_sum(raw, tmp_path) -> None:
    raw["trainer"].update(rollout_detach=True)
    with start_job(lambda: parse_config(raw)) as job:
        run = TrainingRun(job)
        batch = next(iter(run.loaders["train"]))
        run._backward(batch, 0)
        found = [parameter.grad.clone() for parameter in run.model.parameters()]
        run.optimizer.zero_grad()
        (sum(run.shares_of_loss(batch, 1)) / run.trainer.batch_size).backward()
    for parameter, gradient in zip(run.model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)


def test_a_rollout_that_the_period_does_not_hold_is_refused_before_the_ranks_start(raw, tmp_path) -> None:
    raw["trainer"]["rollout"] = 7
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    said = [f"{one.where}: {one.message}" for one in preflight(str(tmp_path / "c.yaml"), [], None)]
    assert any(line.startswith("data.valid: ") and "no sample of 7 step(s) of 6 h" in line for line in said)
    with pytest.raises(DataError, match=r"no sample of 7 step\(s\)"):
        StepDataset(fields_of(raw), "valid")
    assert np.array_equal(StepDataset(fields_of(raw), "train").starts, np.arange(17))
