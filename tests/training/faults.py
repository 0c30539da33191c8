"""Injected faults: a run that is broken somewhere ends within a bound and in words, and goes on to the same weights.

    python -m tests.training.faults 200

prints the table of so many, drawn at random. Two ranks on two cores; each fault is of a run of ten steps.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.errors import CreditError
from credit.training import train as training
from tests.ranks import RankError, World
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import interrupted, losses_and_weights, on

TIMEOUT_S = 8
"""`trainer.timeout`: after so long a rank stops waiting for its peers."""
BOUND_S = 40
"""A fault is known to every living rank after so long: the timeout, and what is between."""


@dataclass
class Fault:
    """One, in one run: `outcome` is what came of it, `problem` says what must not have."""

    kind: str
    outcome: str = ""
    problem: str = ""


class Faults:
    """Breaks copies of one run, and compares what becomes of them with the whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = conf(folder / "whole", write_zarr(folder / "s.zarr", dataset()), dtype="float64", checkpoint_every=1)
        raw["data"]["stats"] = str(folder / "stats.nc")
        raw["trainer"] |= {"timeout": TIMEOUT_S, "ema": 0.9}
        write_statistics(parse_config(raw))
        self.raw = on(raw, folder / "whole", "fsdp2", 2)
        self.world: World | None = None
        _, self.weights = self._started().run(losses_and_weights, self.raw)[0]

    def close(self) -> None:
        if self.world is not None:
            self.world.close()
            self.world = None

    def _started(self) -> World:
        if self.world is None or not self.world.alive:
            self.close()
            self.world = World(2)
        return self.world

    def inject(self, kind: str, pick: random.Random) -> Fault:
        fault = Fault(kind)
        run = Path(tempfile.mkdtemp(dir=self.folder))
        raw = on(self.raw, run, "fsdp2", 2)
        try:
            getattr(self, f"_{kind}")(fault, raw, pick)
            if not fault.problem:
                self._go_on(fault, raw)
        finally:
            shutil.rmtree(run, ignore_errors=True)
            if fault.problem:
                self.close()
        return fault

    def _go_on(self, fault: Fault, raw: dict[str, Any]) -> None:
        """The same command again: to the weights of the whole run, or a refusal in words."""
        try:
            _, weights = self._started().run(losses_and_weights, raw, timeout=120)[0]
        except RankError as error:
            self._expect_words(fault, error)
            fault.outcome += ", then refused"
            return
        except TimeoutError as error:
            fault.problem = f"hangs: {error}"
            return
        same = weights.keys() == self.weights.keys() and all(
            map(np.array_equal, weights.values(), self.weights.values())
        )
        fault.outcome += ", then the same weights"
        fault.problem = "" if same else "other weights, unsaid"

    @staticmethod
    def _expect_words(fault: Fault, error: RankError) -> None:
        raw = [one for one in error.errors.values() if not isinstance(one, CreditError) and "imed out" not in str(one)]
        if raw:
            fault.problem = f"a traceback: {raw[0]!r}"

    def _ended(self, fault: Fault, world: World, ranks: tuple[int, ...] = (0, 1)) -> None:
        """Wait until these ranks have."""
        begin = time.monotonic()
        if not all(world.answers(rank, max(BOUND_S - (time.monotonic() - begin), 0)) for rank in ranks):
            fault.problem = f"no end {BOUND_S} s after the fault"

    def _raises(self, fault: Fault, function: Callable[..., Any], *args: Any) -> None:
        """On every rank, in words."""
        world = self._started()
        world.begin(function, *args)
        self._ended(fault, world)
        if fault.problem:
            self.close()
            return
        try:
            world.finish()
            fault.outcome = "not noticed by any rank"
        except RankError as error:
            self._expect_words(fault, error)
            fault.outcome = f"said by {len(error.errors)} rank(s)"

    # Ranks that go away.

    def _killed(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._lose(fault, raw, pick, signal.SIGKILL)

    def _frozen(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._lose(fault, raw, pick, signal.SIGSTOP)

    def _lose(self, fault: Fault, raw: dict[str, Any], pick: random.Random, number: signal.Signals) -> None:
        self.close()
        world, victim = self._started(), pick.randrange(2)
        wanted = pick.randrange(1, 9)
        world.begin(losses_and_weights, raw)
        log = Path(raw["run"]) / "log.csv"
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) > wanted) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(world._processes[victim].pid or 0, number)
        self._ended(fault, world, (1 - victim,))
        fault.outcome = f"the other rank ended ({number.name})"
        self.close()

    # Disks that do not take what is written.

    def _full_disk(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._raises(fault, with_file_limit, raw, pick.randrange(200, 60_000), pick.randrange(2))

    def _failing_sync(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._raises(fault, with_failing_sync, raw, pick.randrange(40), pick.randrange(2))

    # What is on the disk changes between two jobs.

    def _lost_shard(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        file = self._some_file(raw, pick, "checkpoints/step-*/*")
        file.unlink()
        fault.outcome = f"{file.name} lost"

    def _changed_byte(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        file = self._some_file(raw, pick, "**/*")
        content = bytearray(file.read_bytes())
        content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
        file.write_bytes(content)
        fault.outcome = f"a byte of {file.name} changed"

    def _cut_short(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        file = self._some_file(raw, pick, "**/*")
        os.truncate(file, pick.randrange(file.stat().st_size))
        fault.outcome = f"{file.name} cut short"

    def _some_file(self, raw: dict[str, Any], pick: random.Random, pattern: str) -> Path:
        """Of the run, which has died at some step."""
        self._started().run(interrupted, raw, pick.randrange(3, 10))
        run = Path(raw["run"])
        return pick.choice(sorted(one for one in run.glob(pattern) if one.is_file() and one.stat().st_size))

    # Numbers that are none.

    def _nan_in_data(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        array = zarr.open_array(Path(raw["data"]["path"]) / "a", mode="r+")
        place = pick.randrange(24), pick.randrange(13), pick.randrange(16)
        kept = array[place]
        array[place] = np.nan
        try:
            self._raises(fault, losses_and_weights, raw)
        finally:
            array[place] = kept
        if fault.outcome.startswith("not"):
            fault.problem = "the run went on"

    def _nan_in_gradient(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._raises(fault, with_nan, raw, pick.randrange(10), pick.randrange(2), True)
        if fault.outcome.startswith("not"):
            fault.problem = "the run went on"

    def _nan_in_weight(self, fault: Fault, raw: dict[str, Any], pick: random.Random) -> None:
        self._raises(fault, with_nan, raw, pick.randrange(10), pick.randrange(2), False)
        if fault.outcome.startswith("not"):
            fault.problem = "the run went on"


KINDS = (
    *("killed", "frozen", "full_disk", "failing_sync", "lost_shard", "changed_byte", "changed_byte", "cut_short"),
    *("nan_in_data", "nan_in_gradient", "nan_in_weight"),
)


def with_file_limit(raw: dict[str, Any], size: int, victim: int) -> None:
    """One rank can write no file larger than `size` bytes: the kernel refuses, as on a full disk."""
    kept, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if torch.distributed.get_rank() == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
        with contextlib.redirect_stdout(io.StringIO()):  # which may be a large file
            losses_and_weights(raw)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handler)


def with_failing_sync(raw: dict[str, Any], at: int, victim: int) -> None:
    """On one rank one call of fsync finds that the disk has lost what was written."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise OSError(5, "Input/output error")
        real(descriptor)

    if torch.distributed.get_rank() == victim:
        os.fsync = fsync  # type: ignore[assignment]
    try:
        losses_and_weights(raw)
    finally:
        os.fsync = real


def with_nan(raw: dict[str, Any], at: int, victim: int, gradient: bool) -> None:
    """On one rank, at one step, one number of a gradient or of a weight is none."""
    real = training.Gradients.reduce if gradient else training.TrainingRun._backward
    name, place = ("reduce", training.Gradients) if gradient else ("_backward", training.TrainingRun)
    step = 0

    def damaged(*args: Any) -> Any:
        nonlocal step
        model = args[0]._model if gradient else args[0].model
        step += 1
        if step == at + 1 and torch.distributed.get_rank() == victim:
            parameter = next(one for one in model.parameters() if training.local(one).numel())
            with torch.no_grad():
                training.local(parameter.grad if gradient else parameter).view(-1)[0] = torch.nan
        return real(*args)

    setattr(place, name, damaged)
    try:
        losses_and_weights(raw)
    finally:
        setattr(place, name, real)


def table(faults: list[Fault]) -> str:
    lines = [f"{'fault':<16} {'number':>6}  {'as it should':>12}  what came of them"]
    for kind in dict.fromkeys(fault.kind for fault in faults):
        ours = [fault for fault in faults if fault.kind == kind]
        ends = Counter(fault.outcome.rpartition(", ")[2] for fault in ours if not fault.problem)
        good = sum(not fault.problem for fault in ours)
        words = ", ".join(f"{number} {end}" for end, number in ends.most_common())
        lines.append(f"{kind:<16} {len(ours):>6}  {good:>12}  {words}")
    return "\n".join(
        [*lines, *(f"{fault.kind}: {fault.outcome}: {fault.problem}" for fault in faults if fault.problem)]
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        pick, found = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0), []
        for number in range(int(sys.argv[1])):
            found.append(faults.inject(KINDS[number % len(KINDS)], pick))
            print(f"{number + 1}: {found[-1]}", file=sys.stderr, flush=True)
        faults.close()
    print(table(found))
    sys.exit(any(fault.problem for fault in found))


if __name__ == "__main__":
    main()
