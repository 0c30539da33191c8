"""resumed == uninterrupted, on the same mesh and on another; forecasts and scores are those of one process."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

from credit.config import parse_config
from credit.data.store import FieldStore
from credit.errors import CreditError, Stopped
from credit.launch.job import Job, start_job
from credit.launch.stop import stop_requests
from credit.models.transformer import WindowTransformer
from credit.parallel import checkpoint
from credit.parallel.checkpoint import list_checkpoints
from credit.status import read_status
from credit.training import forecast as forecasting
from credit.training import setup
from credit.training import train as training
from credit.training.export import export
from credit.training.score import score
from tests.ranks import RankError
from tests.stores import dataset
from tests.training.runs import curve, interrupted, losses_and_weights, on, small, with_transformer


def serially(function, *args) -> list:
    return [function(*args)]


@pytest.fixture
def raw(tmp_path) -> dict:
    return small(tmp_path)


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


def stopped(raw: dict, at: int) -> list[float]:
    """Train until rank 1 gets a signal before step `at` + 1; the losses until then."""
    real = training.TrainingRun.train_step

    def step(self, batch, step):
        result = real(self, batch, step)
        if step + 1 == at and self.job.ranks.rank == self.job.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return result

    training.TrainingRun.train_step = step
    try:
        with (
            stop_requests() as request,
            pytest.raises(Stopped, match=f"at step {at} of 10"),
            start_job(lambda: parse_config(raw)) as job,
        ):
            training.train(job, request)
    finally:
        training.TrainingRun.train_step = real
    with (Path(raw["run"]) / "log.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_a_signal_on_one_rank_stops_all_after_saving(worlds, raw, tmp_path, at) -> None:
    """Within an epoch, at its end (5), and where there is a checkpoint already (6); the rest is bitwise the same."""
    given = on(raw, tmp_path / "stopped", "none", 2)
    whole, *_ = worlds(2).run(curve, on(raw, tmp_path / "whole", "none", 2))[0]
    (begun, others) = worlds(2).run(stopped, given, at)
    assert begun == others == whole[:at]
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == f"step-{at:08d}"
    assert read_status(tmp_path / "stopped")[1] == 75
    rest, *_ = worlds(2).run(curve, given)[0]
    assert rest == whole[at:]
    assert read_status(tmp_path / "stopped")[1] == 0


@pytest.fixture
def transformer(raw) -> dict:
    return with_transformer(raw)


MESHES = {
    "2x2x2": (8, "fsdp2", 2, 2),
    "4x1x1": (4, "fsdp2", 1, 1),
    "1x4x2": (8, "none", 2, 4),
    "1x1x1": (1, "none", 1, 1),
    "2x2x1": (4, "ddp", 1, 2),
}


@pytest.fixture(scope="module")
def half(worlds, tmp_path_factory) -> tuple[dict, Path, list[float], dict[str, np.ndarray]]:
    """A run that dies in its fifth step on (2, 2, 2), and the losses and weights of the serial one."""
    folder = tmp_path_factory.mktemp("half")
    given = with_transformer(small(folder))
    losses, weights = losses_and_weights(on(given, folder / "whole", "none", 1))
    size, data, domain, tensor = MESHES["2x2x2"]
    worlds(size).run(interrupted, on(given, folder / "cut", data, domain, tensor), 4)
    return given, folder / "cut", losses, weights


@pytest.mark.parametrize("after", [*MESHES, "no ranks"])
def test_a_run_moves_from_any_mesh_to_any_other(worlds, half, tmp_path, after) -> None:
    """No sample is repeated or skipped: the rest of the curve is the serial one's, and so are weights and averages."""
    transformer, begun, whole_losses, whole_weights = half
    cut = tmp_path / "cut"
    shutil.copytree(begun, cut)
    if after == "no ranks":
        rest, weights = losses_and_weights(on(transformer, cut, "none", 1))
    else:
        size, data, domain, tensor = MESHES[after]
        (rest, weights), *_ = worlds(size).run(losses_and_weights, on(transformer, cut, data, domain, tensor))
    assert len(rest) == len(whole_losses) - 3
    assert rest == pytest.approx(whole_losses[3:], rel=1e-8, abs=0)
    assert weights.keys() == whole_weights.keys()
    for name, value in whole_weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-8 * abs(value).max(), err_msg=name)


def exported(raw: dict, path: Path) -> None:
    with start_job(lambda: parse_config(raw)) as job:
        export(job, path)


def test_weights_leave_as_the_plain_models_and_come_back(worlds, transformer, tmp_path) -> None:
    size, data, domain, tensor = MESHES["2x2x2"]
    given = on(transformer, tmp_path / "run", data, domain, tensor)
    worlds(size).run(curve, given)
    worlds(size).run(exported, given, tmp_path / "mesh.pt")
    exported(on(transformer, tmp_path / "run", "none", 1), tmp_path / "single.pt")
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("mesh.pt", "single.pt"))
    plain = WindowTransformer(5, 2, (13, 16), width=16, depth=2, heads=4, window=2, ratio=2)
    assert ours.keys() == plain.state_dict().keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].shape == plain.state_dict()[name].shape
    started = on(
        {**transformer, "trainer": {**transformer["trainer"], "init_from": str(tmp_path / "mesh.pt")}},
        tmp_path / "b",
        "none",
        1,
    )
    alone, *_ = curve(started)
    for losses, *_ in worlds(8).run(curve, on(started, tmp_path / "c", data, domain, tensor)):
        assert losses == pytest.approx(alone, rel=1e-8)
    first, *_ = curve(on(transformer, tmp_path / "d", "none", 1))
    assert alone[0] < first[0]
    started["model"] = {**started["model"], "width": 8}
    with pytest.raises(CreditError, match=r"mesh.pt does not hold this model's weights: .*size mismatch"):
        curve(on(started, tmp_path / "e", "none", 1))
    started["trainer"]["init_from"] = str(tmp_path / "nothing.pt")
    with pytest.raises(CreditError, match=r"cannot read the weights .*nothing.pt: No such file"):
        curve(on(started, tmp_path / "f", "none", 1))


def test_writing_in_the_background_gives_the_same_checkpoints(worlds, transformer, tmp_path) -> None:
    size, data, domain, tensor = MESHES["2x2x1"]
    transformer["trainer"]["checkpoint_every"] = 1
    curves = []
    for name, in_background in (("at once", False), ("later", True)):
        transformer["trainer"]["checkpoint_async"] = in_background
        curves.append(worlds(size).run(curve, on(transformer, tmp_path / name, data, domain, tensor))[0][0])
    assert curves[0] == curves[1]
    transformer["trainer"]["checkpoint_async"] = False
    states = []
    for name in ("at once", "later"):
        exported(on(transformer, tmp_path / name, "none", 1), tmp_path / "weights.pt")
        states.append(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_failure_in_the_background_ends_all_ranks(worlds, transformer, tmp_path) -> None:
    transformer["trainer"].update(checkpoint_every=1, checkpoint_async=True)
    with pytest.raises(RankError, match=r"writing the checkpoint .* failed .*on rank 1: OSError: no room") as caught:
        worlds(2).run(full_disk, on(transformer, tmp_path / "run", "none", 2))
    assert len(caught.value.errors) == 2


def full_disk(raw: dict) -> None:
    real = checkpoint.dcp.save

    def save(*args, **kwargs) -> None:
        if dist.get_rank() == 1:
            raise OSError("no room")

    checkpoint.dcp.save = save
    try:
        curve(raw)
    finally:
        checkpoint.dcp.save = real


@pytest.mark.parametrize("damage", ["cut short", "changed", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(worlds, raw, tmp_path, damage) -> None:
    whole_losses, *_ = curve(on(raw, tmp_path / "whole", "none", 1))
    cut = on(raw, tmp_path / "cut", "none", 2)
    worlds(2).run(interrupted, cut, 8)
    newest = list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    file = next(newest.glob("*.distcp"))
    content = file.read_bytes()
    changed = {"cut short": content[: len(content) // 2], "changed": content[:-1] + bytes([content[-1] ^ 1])}
    file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
    rest, said = worlds(2).run(losses_and_words, cut)[0]
    assert f"{newest} is damaged: {file.name} " in said
    assert f"going back to the one before\nresuming from {newest.with_name('step-00000003')}" in said
    assert rest == pytest.approx(whole_losses[3:], rel=1e-9)
    assert [path.name for path in list_checkpoints(newest.parent)] == ["step-00000009", "step-00000010"]


def losses_and_words(raw: dict) -> tuple[list[float], str]:
    """The losses, and what the run says."""
    said: list[str] = []
    real, Job.say = Job.say, lambda self, text: said.append(text)
    try:
        return curve(raw)[0], "\n".join(said)
    finally:
        Job.say = real


def test_only_damaged_checkpoints_are_an_error_on_every_rank(worlds, raw, tmp_path) -> None:
    cut = on(raw, tmp_path / "cut", "none", 2)
    worlds(2).run(interrupted, cut, 4)
    for file in (tmp_path / "cut" / "checkpoints").glob("*/*.distcp"):
        file.write_bytes(b"")
    message = r"no checkpoint is whole: .*step-00000003 is damaged: .* to start again"
    with pytest.raises(RankError, match=message) as caught:
        worlds(2).run(curve, cut)
    assert len(caught.value.errors) == 2


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
    for size, data, domain, rows in ((2, "none", 2, 7), (4, "fsdp2", 2, 7), (4, "ddp", 1, 13), (4, "none", 4, 4)):
        worlds(size).run(forecast_on, on(trained, tmp_path / "run", data, domain))
        with xr.open_zarr(tmp_path / "run" / "forecast.zarr", consolidated=False) as store:
            assert store.b.encoding["chunks"] == (1, 1, rows, 16)
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
