"""Ensembles: members differ by noise alone, which is the same on every mesh and in every run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from credit.checks.parity import model_shape
from credit.config import Loss, parse_config
from credit.config.parallelism import Sharding
from credit.errors import CheckpointError, ConfigError
from credit.evaluation.forecast import forecast, roll_out
from credit.launch.job import start_job
from credit.layout import MeshShape
from credit.models import DOMAIN_CONVERTERS
from credit.models.unet import UNet
from credit.parallel.plan import Planner, Work
from credit.training.noise import Noise
from credit.training.train import TrainingRun
from tests.ranks import RankError
from tests.training.runs import curve, interrupted, on, small

MEMBERS = 3
NOISE = Noise(7, (13, 16), range(13), torch.device("cpu"), torch.float64)


@pytest.fixture
def raw(tmp_path) -> dict:
    given = small(tmp_path)
    given["trainer"].update(loss={"kind": "crps", "members": 2, "spectral": 0.1}, rollout=2, epochs=1)
    given["forecast"]["members"] = MEMBERS
    return given


# What members are given


def test_noise_is_standard_normal_and_a_function_of_its_purpose_alone() -> None:
    fields = NOISE([(1, sample, member) for sample in range(20) for member in range(5)], 0)
    assert fields.shape == (100, 1, 13, 16)
    assert abs(float(fields.mean())) < 0.03
    assert float(fields.std()) == pytest.approx(1, abs=0.03)
    assert len({float(field[0, 0, 0]) for field in fields}) == 100
    again = NOISE([(1, 19, 4), (1, 0, 0)], 0)
    assert torch.equal(again, fields[[99, 0]])
    for other in (NOISE([(1, 0, 0)], 1), NOISE([(2, 0, 0)], 0), replace(NOISE, seed=8)([(1, 0, 0)], 0)):
        assert not torch.equal(other, fields[:1])


@pytest.mark.parametrize("rows", [range(0, 5), range(5, 9), range(9, 13)])
def test_a_rank_has_its_rows_of_the_globe(rows) -> None:
    assert torch.equal(replace(NOISE, rows=rows)([(3, 4)], 1), NOISE([(3, 4)], 1)[:, :, rows.start : rows.stop])


def test_every_member_has_noise_of_its_own_in_every_step_and_draw(raw) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        run = TrainingRun(job)
        batch, given = next(iter(run.loaders["train"])), []

        def model(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            return torch.zeros_like(x[:, :2])

        run.predict = model
        for draw in (1, 2, 1):
            list(run.shares_of_loss(batch, draw))
    assert [len(x) for x in given] == [2 * len(batch["x"])] * 6
    noise = [x[:, -1] for x in given]
    assert torch.equal(noise[0], noise[4])
    assert torch.equal(noise[1], noise[5])
    assert len({float(field[0, 0]) for fields in noise[:4] for field in fields}) == 4 * len(noise[0])
    state = given[0][:, :-1]
    assert torch.equal(state[0::2], state[1::2])
    assert torch.equal(state[0::2], batch["x"].double())


def test_every_optimiser_step_draws_anew_and_so_does_validation(raw) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        run, given = TrainingRun(job), []
        batch, predict = next(iter(run.loaders["train"])), run.predict
        run.predict = lambda x: (given.append(x[:, -1]), predict(x))[1]
        run.train_step(batch, 0)
        run.train_step(batch, 1)
        list(run.shares_of_loss(batch, draw=0))  # as validation does, at every epoch
    first, second, validation = given[0], given[2], given[4]
    for one, other in ((first, second), (first, validation), (second, validation)):
        assert not (one == other).any()


# The same on every mesh


MESHES = [(4, "fsdp2", 2), (2, "ddp", 1), (3, "none", 3)]
DETACHED = {"rollout_detach": True, "accumulate": 2}


@pytest.mark.parametrize(("more", "meshes"), [({}, MESHES), (DETACHED, MESHES[:2])], ids=["joined", "detached"])
def test_every_mesh_gives_the_curve_of_one_process(worlds, raw, tmp_path, more, meshes) -> None:
    raw["trainer"].update(more)
    losses, valid, norms = curve(on(raw, tmp_path / "alone", "none", 1))
    assert len(losses) == 5
    for size, data, domain in meshes:
        for found in worlds(size).run(curve, on(raw, tmp_path / f"{size}", data, domain)):
            assert found[0] == pytest.approx(losses, rel=1e-9, abs=0)
            assert found[1] == pytest.approx(valid, rel=1e-9, abs=0)
            assert found[2] == pytest.approx(norms, rel=1e-8, abs=0)


def test_a_killed_run_goes_on_as_if_it_had_not_been(worlds, raw, tmp_path) -> None:
    """Bitwise, with its noise and its rollout; and as another rollout not at all."""
    whole, *_ = worlds(2).run(curve, on(raw, tmp_path / "whole", "none", 2))[0]
    cut = on(raw, tmp_path / "cut", "none", 2)
    worlds(2).run(interrupted, cut, 4)
    other = {**cut, "trainer": {**cut["trainer"], "rollout": 3}}
    with pytest.raises(RankError, match=r"trainer.rollout was 2 and is 3") as caught:
        worlds(2).run(curve, other)
    assert all(isinstance(error, CheckpointError) for error in caught.value.errors.values())
    rest, *_ = worlds(2).run(curve, cut)[0]
    assert rest == whole[3:]


def forecast_on(raw: dict) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        forecast(job)


def made(run: Path) -> xr.Dataset:
    with xr.open_zarr(run / "forecast.zarr", consolidated=False) as store:
        return store.load()


def test_forecasts_are_those_of_one_process_and_of_the_definition(worlds, raw, tmp_path) -> None:
    raw["trainer"]["learning_rate"] = 0.02
    raw["forecast"]["every"] = 2  # nine members of starts, which are not as many for each of two replicas
    curve(raw)
    forecast_on(raw)
    serial = made(tmp_path / "run")
    assert serial.sizes == {"init_time": 3, "number": MEMBERS, "lead_time": 4, "latitude": 13, "longitude": 16}
    assert serial.number.attrs["standard_name"] == "realization"
    assert np.isfinite(serial.to_array()).all()
    assert (serial.b.std("number").mean(("init_time", "latitude", "longitude")) > 0).all()
    with start_job(lambda: parse_config(raw)) as job:
        run = TrainingRun(job)
        run.resume()
        start = serial.init_time.values[2]
        index, minutes = np.array(run.fields.store.indices([start])), int(start.astype("datetime64[m]").astype(int))
        for member in range(MEMBERS):
            noise = partial(replace(NOISE, seed=0), [(minutes, member)])
            *_, state = roll_out(run.model, run.fields, index, 4, job.device, torch.float64, noise)
            wanted = run.fields.physical(state)[0, 1]
            np.testing.assert_allclose(serial.b[2, member, 3], wanted, rtol=1e-6)
    for size, data, domain in ((4, "fsdp2", 2), (3, "none", 3)):
        shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / f"{size}" / "checkpoints")
        worlds(size).run(forecast_on, on(raw, tmp_path / f"{size}", data, domain))
        xr.testing.assert_allclose(made(tmp_path / f"{size}"), serial, rtol=1e-6)


# What is refused, and what it costs


def test_members_of_a_model_that_gives_one_state_are_refused(raw) -> None:
    raw["trainer"]["loss"] = {"kind": "mse"}
    with pytest.raises(ConfigError, match=r"forecast.members: 3 would all be the same: .* by crps it learns"):
        parse_config(raw)


def test_what_is_checked_and_planned_has_the_noise_too(raw) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        run = TrainingRun(job)
        batch = next(iter(run.loaders["train"]))
        assert model_shape(job.config)[:2] == (batch["x"].shape[1] + 1, batch["y"].shape[2])
        assert run.fields.input_channels == batch["x"].shape[1] + 1


def test_a_plan_counts_members_as_samples() -> None:
    def cost(batch: int, members: int):
        sharding = Sharding(parallelism={"data": "ddp", "domain": 2})
        build = lambda rows: UNet(4, 3, (rows, 24), width=8, levels=1)  # noqa: E731
        return Planner(build, (4, 25, 24), sharding, Work(batch, members=members), DOMAIN_CONVERTERS).cost(
            MeshShape(2, 1, 2)
        )

    assert cost(4, members=3) == cost(12, members=1)
    assert [Loss(kind=kind, members=3).ensemble for kind in ("crps", "mse")] == [3, 1]
