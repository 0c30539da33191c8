"""Batches read by workers are those that the rank reads; errors arrive; nothing outlives the rank."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from credit.config import parse_config
from credit.data.dataset import StepDataset
from credit.data.loading import BatchLoader
from credit.data.prepare import write_statistics
from credit.data.sampler import DataParallelSampler, Draw
from credit.errors import CreditError, DataError
from credit.launch.contract import enforce_sampler_contract
from credit.training.batches import AgreedBatches
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve, fields_of, on, small
from tests.waiting import until


@pytest.fixture(scope="module", autouse=True)
def server(worlds) -> None:
    """Let ranks start the server that workers are forked from too: it imports for ranks what workers can do without.

    The other way round, every rank of the session would import all by itself.
    """
    worlds(2)


class Probe:
    """Batches of `reading`, which may say what its process has, fail, take its time, or die."""

    def __init__(self, reading: Callable[[int], Any]) -> None:
        self.reading = reading

    def __len__(self) -> int:
        return 6

    def __getitems__(self, draws: list[Draw]) -> Any:
        return self.reading(draws[0].sample)


def loader(reading: Callable[[int], Any], workers: int = 1) -> BatchLoader:
    return BatchLoader(Probe(reading), DataParallelSampler(6, 1, 0, 1), workers, 2, pin=False)  # type: ignore[arg-type]


@contextmanager
def loading(reading: Callable[[int], Any], workers: int = 1) -> Iterator[BatchLoader]:
    """A loader whose workers end with it.

    One that an error holds on to goes with its garbage, where torch waits five seconds for each worker, in vain.
    """
    opened = loader(reading, workers)
    try:
        yield opened
    finally:
        opened._iterator._shutdown_workers()  # type: ignore[union-attr]


def test_batches_are_bitwise_the_same_with_any_number_of_workers(tmp_path) -> None:
    """Over passes, and from the middle of one."""
    raw = small(tmp_path)
    raw["trainer"]["rollout"] = 2
    raw["data"]["forcings"] = ["cos_zenith"]
    data = StepDataset(fields_of(raw, range(3, 8)), "train")

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = DataParallelSampler(len(data), 4, 1, 2, seed=3)
        reader = BatchLoader(data, sampler, workers, 2, pin=False)
        seen = []
        for epoch, first in ((0, 0), (1, 3), (2, 0)):
            sampler.start_at(epoch, first)
            seen += list(reader)
        return seen

    here = batches(0)
    assert len(here) == 5 + 2 + 5
    for workers in (1, 3):
        there = batches(workers)
        for mine, theirs in zip(here, there, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def read(batches: Iterable[Any], seen: list[Any]) -> None:
    for batch in batches:
        seen.append(batch)


def signals_and_process(sample: int) -> tuple[set[int], int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getpid()


def test_a_worker_leaves_signals_to_its_rank() -> None:
    for blocked, process in loader(signals_and_process, workers=2):
        assert blocked >= {signal.SIGTERM, signal.SIGUSR2}
        assert process != os.getpid()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd: {one + two}")


def refuses(sample: int) -> torch.Tensor:
    if sample == 3:
        raise DataError("it is not there")
    return torch.tensor(sample)


def breaks(sample: int) -> torch.Tensor:
    raise KeyError("z500")


def cannot_be_sent(sample: int) -> torch.Tensor:
    raise Odd(1, 2)


def dies(sample: int) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor(sample)


def test_an_error_in_a_worker_arrives_as_it_is() -> None:
    seen: list[Any] = []
    with loading(refuses, workers=2) as batches, pytest.raises(DataError) as caught:
        read(batches, seen)
    assert str(caught.value) == "it is not there"
    assert torch.stack(seen).tolist() == [0, 1, 2]
    with loading(breaks) as batches, pytest.raises(KeyError, match="z500") as caught:
        next(iter(batches))
    assert "in breaks" in "".join(caught.value.__notes__)
    with loading(cannot_be_sent) as batches, pytest.raises(RuntimeError, match=r"odd: 3"):
        next(iter(batches))


def test_a_worker_that_dies_is_told_of() -> None:
    with pytest.raises(DataError, match=r"exited unexpectedly: is there memory for data.workers: 1 x data.prefetch: 2"):
        next(iter(loader(dies)))


def may_have_workers() -> None:
    """Ranks of tests are daemons, which multiprocessing denies children."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def slowly(sample: int) -> dict[str, torch.Tensor]:
    time.sleep(0.3 if os.environ["RANK"] == "1" and sample == 2 else 0)
    if os.environ["RANK"] == "1" and sample == 4:
        raise DataError("it is not there")
    return {"sample": torch.tensor([sample])}


def waited_for(batches: AgreedBatches) -> float:
    waited = batches.waited
    batches.agree()
    return waited


def seconds_and_message(workers: int) -> tuple[list[float], str]:
    may_have_workers()
    whole = {"trainer": {"parallelism": {"data": "none", "tensor": 1, "domain": 2}}}
    checked = enforce_sampler_contract(loader(slowly, workers), whole, whole=["sample"], every=2)
    batches = AgreedBatches(checked)
    waited: list[float] = []
    with pytest.raises(CreditError) as caught:
        read((waited_for(batches) for _ in batches), waited)
    return waited, str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_hear_of_one_ranks_wait_and_of_its_error(worlds, workers) -> None:
    (waited, message), (same, other) = worlds(2).run(seconds_and_message, workers)
    assert waited == same
    assert len(waited) == 4
    assert message == other == "reading a batch failed on rank 1: it is not there"
    if not workers:
        assert waited[2] > 0.3 > waited[1]


def curve_with_workers(raw: dict[str, Any]) -> Any:
    may_have_workers()
    return curve(raw)


def test_training_with_workers_is_bitwise_training_without(worlds, tmp_path) -> None:
    raw = small(tmp_path)
    raw["trainer"]["epochs"] = 1
    losses, valid, _ = worlds(2).run(curve, on(raw, tmp_path / "without", "none", 2))[0]
    given = on(raw, tmp_path / "with", "none", 2)
    given["data"] = {**given["data"], "workers": 1, "prefetch": 1}
    for found in worlds(2).run(curve_with_workers, given):
        assert found[:2] == (losses, valid)
    with (tmp_path / "with" / "log.csv").open() as stream:
        assert all(float(row["waited"]) >= 0 for row in csv.DictReader(stream))


def processes_of(session: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(place.name))
    return found


@pytest.fixture
def sessions() -> Iterator[list[subprocess.Popen]]:
    """Started with `start_new_session`; of those that a failed test leaves, every process is ended."""
    started: list[subprocess.Popen] = []
    yield started
    for first in started:
        for process in processes_of(first.pid):
            os.kill(process, signal.SIGKILL)


def test_no_worker_outlives_its_rank_and_none_hears_its_signals(tmp_path, sessions) -> None:
    """Killed; asked to stop, with all its processes, as Slurm does; finished."""
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), epochs=20, checkpoint_every=5)
    raw["data"]["workers"] = 2
    raw["data"]["stats"] = str(tmp_path / "stats.nc")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    write_statistics(parse_config(raw))
    log = tmp_path / "run" / "log.csv"

    def steps() -> int:
        return len(log.read_text().splitlines()) - 1 if log.exists() else 0

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "credit", "train", str(tmp_path / "c.yaml")]
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": "1", "CREDIT_LAUNCHER": "mpi"}
        run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        sessions.append(run)
        return run

    killed = start()
    until(lambda: steps() > 6, "steps are done", 150)
    has_mpi = {process: "libmpi" in Path(f"/proc/{process}/maps").read_text() for process in processes_of(killed.pid)}
    assert len(has_mpi) > 4  # the rank, its workers for training, and those for validation; what starts them
    assert [process for process, it_has in has_mpi.items() if it_has] == [killed.pid]
    killed.kill()
    killed.wait()
    until(lambda: not processes_of(killed.pid), "all processes of the killed run are gone", 20)

    stopped, before = start(), steps()
    until(lambda: steps() not in (before, 0) and steps() > 12, "more steps are done", 150)
    for process in processes_of(stopped.pid):
        os.kill(process, signal.SIGUSR2)
    _, said = stopped.communicate(timeout=150)
    assert stopped.returncode == 75
    assert said.count("\n") == 1
    assert said.startswith("credit: stopped: at step")
    until(lambda: not processes_of(stopped.pid), "all processes of the stopped run are gone", 20)

    finished = start()
    _, said = finished.communicate(timeout=150)
    assert (finished.returncode, said) == (0, "")
    assert steps() == 100
    until(lambda: not processes_of(finished.pid), "all processes of the finished run are gone", 20)
