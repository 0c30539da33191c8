"""resumed == uninterrupted, on the same mesh and on another; weights that leave, and come back."""

from __future__ import annotations

import csv
import functools
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.errors import CreditError, Stopped
from credit.launch import job as jobs
from credit.launch.job import sole_writer, start_job
from credit.layout import Seat
from credit.models.transformer import WindowTransformer
from credit.parallel.checkpoint import list_checkpoints
from credit.status import read_status
from credit.stop import stop_requests
from credit.training import train as training
from tests.ranks import RankError
from tests.training.runs import curve, exported, interrupted, losses_and_weights, on, small, with_transformer


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict:
    """Ten steps with checkpoints at 2, 4, 6, 8 and 10. Tests give it a directory and a mesh, and change nothing."""
    given = small(tmp_path_factory.mktemp("small"))
    given["trainer"]["checkpoint_every"] = 2
    return given


def logged(run: Path) -> dict[int, float]:
    """The loss of each step in the log, every one of which is there once."""
    with (run / "log.csv").open(newline="") as stream:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(stream)]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))
    return dict(rows)


@pytest.fixture(scope="module")
def of_two(worlds, raw, tmp_path_factory) -> Callable[[str], tuple]:
    """of_two(data): the curve of the uninterrupted run on a domain of two ranks."""

    @functools.cache
    def uninterrupted(data: str) -> tuple:
        return worlds(2).run(curve, on(raw, tmp_path_factory.mktemp("whole"), data, 2))[0]

    return uninterrupted


@pytest.mark.parametrize(("data", "at"), [("ddp", 2), ("fsdp2", 7)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(worlds, raw, of_two, tmp_path, data, at) -> None:
    """On the same mesh: bitwise. Killed just after a checkpoint, and a step later, in the second epoch."""
    whole, whole_valid, _ = of_two(data)
    cut = on(raw, tmp_path, data, 2)
    worlds(2).run(interrupted, cut, at)
    rest, rest_valid, _ = worlds(2).run(curve, cut)[0]
    assert len(whole) == 10
    assert len(rest) == 10 - at // 2 * 2
    assert rest == whole[-len(rest) :]
    assert rest_valid == whole_valid
    assert list(logged(tmp_path).values()) == whole


def test_a_run_killed_on_one_mesh_after_another_goes_on_as_if_it_had_not_been(worlds, raw, tmp_path) -> None:
    """Each of five meshes takes over from the one before, which died a step after its checkpoint."""
    whole, whole_valid, _ = curve(on(raw, tmp_path / "whole", "none", 1))
    cut = tmp_path / "cut"
    interrupted(on(raw, cut, "none", 1), 3)
    worlds(4).run(interrupted, on(raw, cut, "fsdp2", 2), 5)
    interrupted(on(raw, cut, "none", 1), 7)
    worlds(4).run(interrupted, on(raw, cut, "ddp", 2), 9)
    rest, rest_valid, _ = worlds(3).run(curve, on(raw, cut, "none", 3))[0]
    assert len(rest) == 2
    assert rest == pytest.approx(whole[-2:], rel=1e-9, abs=0)
    assert rest_valid == pytest.approx(whole_valid, rel=1e-9, abs=0)
    assert list(logged(cut).values()) == pytest.approx(whole, rel=1e-9, abs=0)


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
    return list(logged(Path(raw["run"])).values())


def test_signals_on_one_rank_stop_all_after_saving(worlds, raw, of_two, tmp_path) -> None:
    """Within an epoch, at its end (5), and where there is a checkpoint already (4, 6); the rest is bitwise the same.

    One run is stopped again and again: it goes on from where it was stopped.
    """
    whole, *_ = of_two("ddp")
    given = on(raw, tmp_path, "ddp", 2)
    for at in (1, 4, 5, 6):
        (begun, others) = worlds(2).run(stopped, given, at)
        assert begun == others == whole[:at]
        assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{at:08d}"
        assert read_status(tmp_path)[1] == 75
    rest, *_ = worlds(2).run(curve, given)[0]
    assert rest == whole[6:]
    assert read_status(tmp_path)[1] == 0


def stopped_before(raw: dict) -> tuple[int, str]:
    """With a request on rank 0 before anything is done; the exit code, and what is said."""
    with stop_requests() as request, start_job(lambda: parse_config(raw)) as job:
        if job.is_first:
            os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(Stopped) as caught:
            training.train(job, request)
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("path", ["demo", "era5-sample"])
def test_a_signal_while_data_or_statistics_are_made_stops_all_ranks(worlds, raw, tmp_path, path) -> None:
    given = on(raw, tmp_path / "run", "none", 2)
    given["data"] = {**raw["data"], "path": path, "variables": ["u500"] if path == "demo" else ["t2m"], "statics": []}
    given["data"] |= {"stats": None, "train": ["2026-03-25", "2026-03-29"], "gaps": "skip", "step": "7h"}
    given["data"] |= {"valid": ["2026-03-29", "2026-03-30"], "test": ["2026-03-30", "2026-04-01"]}
    given["forecast"] = {"lead": "7h"}
    for code, said in worlds(2).run(stopped_before, given):
        assert code == 75
        what = {"demo": "demo weather", "era5-sample": "statistics"}[path]
        assert re.match(rf"by SIGUSR2, \d+ of \d+ into {what} -> .*: the same command begins that anew", said)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def removed_between(raw: dict) -> None:
    """Rank 0 removes the run directory after three steps."""
    real = training.TrainingRun.train_step

    def step(self, batch, number):
        if number == 3 and self.job.is_first:
            shutil.rmtree(raw["run"])
        return real(self, batch, number)

    training.TrainingRun.train_step = step
    try:
        curve(raw)
    finally:
        training.TrainingRun.train_step = real


def test_a_run_directory_that_is_removed_ends_its_run(worlds, raw, tmp_path) -> None:
    with pytest.raises(RankError, match=r"was removed while this job ran, with its checkpoints"):
        worlds(2).run(removed_between, on(raw, tmp_path / "run", "none", 2))


def stopped_in_validation(raw: dict) -> list[str]:
    """The last rank gets a signal when the second epoch's validation reads its first batch; what the log holds."""
    real = training.TrainingRun.shares_of_loss

    def shares(self, batch, draw):
        at = self.optimizer.state_dict()["state"].get(0, {}).get("step", 0)
        if draw == 0 and int(at) == 10 and self.job.ranks.rank == self.job.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return real(self, batch, draw)

    training.TrainingRun.shares_of_loss = shares
    try:
        with (
            stop_requests() as request,
            pytest.raises(Stopped, match="at step 10 of 10"),
            start_job(lambda: parse_config(raw)) as job,
        ):
            training.train(job, request)
    finally:
        training.TrainingRun.shares_of_loss = real
    return (Path(raw["run"]) / "valid.csv").read_text().splitlines()


def test_a_signal_in_validation_stops_it_and_the_next_job_validates(worlds, raw, of_two, tmp_path) -> None:
    _, whole_valid, *_ = of_two("ddp")
    given = on(raw, tmp_path, "ddp", 2)
    begun, _ = worlds(2).run(stopped_in_validation, given)
    assert [line.split(",")[0] for line in begun] == ["step", "5"]
    assert read_status(tmp_path)[1] == 75
    losses, valid, *_ = worlds(2).run(curve, given)[0]
    assert losses == []
    assert valid == whole_valid
    rows = (tmp_path / "valid.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows] == ["step", "5", "10"]
    assert read_status(tmp_path)[1] == 0
    curve(on(raw, tmp_path, "none", 1))
    assert (tmp_path / "valid.csv").read_text().splitlines() == rows


def in_directories_of_ones_own(folder: Path) -> None:
    """As on nodes that do not share the disk."""
    rank = dist.get_rank()
    config = SimpleNamespace(run=folder / str(rank))
    seats = [Seat(f"n{n}", "cpu") for n in range(2)]
    job: Any = SimpleNamespace(config=config, is_first=rank == 0, ranks=SimpleNamespace(rank=rank), seats=seats)
    with patch.object(jobs, "SEEN_S", 0.5), sole_writer(job):
        raise AssertionError("it was not noticed")


def test_a_run_directory_that_each_node_has_for_itself_is_refused(worlds, tmp_path) -> None:
    message = "rank 1 on n1 does not see what rank 0 writes into .*a file system that all nodes share"
    with pytest.raises(RankError, match=message) as caught:
        worlds(2).run(in_directories_of_ones_own, tmp_path)
    assert len(caught.value.errors) == 2


MESHES = {
    "2x2x2": (8, "fsdp2", 2, 2),
    "4x1x1": (4, "fsdp2", 1, 1),
    "1x4x2": (8, "none", 2, 4),
    "1x1x1": (1, "none", 1, 1),
    "2x2x1": (4, "ddp", 1, 2),
}


@pytest.fixture(scope="module")
def half(worlds, tmp_path_factory) -> tuple[dict, Path, list[float], dict[str, np.ndarray]]:
    """A run of six steps that dies in its third on (2, 2, 2), and the losses and weights of the serial one."""
    folder = tmp_path_factory.mktemp("half")
    given = with_transformer(small(folder))
    given["data"]["train"] = ["2020-01-01", "2020-01-04 06:00"]  # three steps an epoch
    given["trainer"]["checkpoint_every"] = 2
    write_statistics(parse_config(given))
    losses, weights = losses_and_weights(on(given, folder / "whole", "none", 1))
    size, data, domain, tensor = MESHES["2x2x2"]
    worlds(size).run(interrupted, on(given, folder / "cut", data, domain, tensor), 2)
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
    assert len(whole_losses) == 6
    assert len(rest) == len(whole_losses) - 2
    assert rest == pytest.approx(whole_losses[2:], rel=1e-8, abs=0)
    assert weights.keys() == whole_weights.keys()
    for name, value in whole_weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-8 * abs(value).max(), err_msg=name)


def test_weights_leave_as_the_plain_models_and_come_back(worlds, half, tmp_path) -> None:
    transformer, begun, whole_losses, _ = half
    cut = tmp_path / "cut"
    shutil.copytree(begun, cut)
    size, data, domain, tensor = MESHES["2x2x2"]
    worlds(size).run(exported, on(transformer, cut, data, domain, tensor), tmp_path / "mesh.safetensors")
    exported(on(transformer, cut, "none", 1), tmp_path / "single.safetensors")
    ours, theirs = (load_file(tmp_path / name) for name in ("mesh.safetensors", "single.safetensors"))
    plain = WindowTransformer(5, 2, (13, 16), width=16, depth=2, heads=4, window=2, ratio=2)
    assert ours.keys() == plain.state_dict().keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].shape == plain.state_dict()[name].shape
    trainer = {**transformer["trainer"], "epochs": 1, "init_from": str(tmp_path / "mesh.safetensors")}
    started = on({**transformer, "trainer": trainer}, tmp_path / "b", "none", 1)
    alone, *_ = curve(started)
    for losses, *_ in worlds(size).run(curve, on(started, tmp_path / "c", data, domain, tensor)):
        assert losses == pytest.approx(alone, rel=1e-8)
    assert alone[0] < whole_losses[0]
    started["model"] = {**started["model"], "width": 8}
    with pytest.raises(CreditError, match=r"mesh.safetensors does not hold this model's weights: .*has the shape"):
        curve(on(started, tmp_path / "e", "none", 1))
    started["trainer"]["init_from"] = str(tmp_path / "nothing.pt")
    with pytest.raises(CreditError, match=r"cannot read the weights .*nothing.pt: No such file"):
        curve(on(started, tmp_path / "f", "none", 1))
