"""How far a run is: one small file in the run directory, read by `credit status` and by job scripts. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from credit.errors import DataError, LaunchError, Stopped
from credit.files import write_atomically
from credit.reading import read_json

FILE = "status.json"
CLAIM_S = 30.0
"""File systems over a network give a lock back some time after its node has gone."""


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Be the only job that writes into a run directory.

    Two jobs of one config, and ranks that do not know of each other (in containers without their launcher's variables),
    meet here.

    Raises:
        LaunchError: if another process has it, after waiting for half a minute; or if it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".lock").touch()
    except OSError as error:
        raise LaunchError(f"the run directory cannot be written: {error}. Set `run` to another one") from None
    deadline = time.monotonic() + CLAIM_S
    with (run / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"another job writes into {run}: wait for its end, or set `run` to a directory of its own. If "
                        f"you started one job of several ranks, they do not know of each other: see `credit layout`"
                    ) from None
                time.sleep(0.5)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                break  # a file system without locks
        yield


def refuse_removed(run: Path) -> None:
    """Raise a LaunchError if the run directory is not the one that was claimed."""
    if not (run / ".lock").exists():
        raise LaunchError(f"{run} was removed while this job ran, with its checkpoints: the same command starts again")


@dataclass(frozen=True)
class Status:
    """How far a run is; stopped: saved, to be resumed.

    Attributes:
        mesh: (dp, tp, domain) of the job.
    """

    state: Literal["running", "stopped", "finished"]
    step: int
    steps: int
    mesh: tuple[int, int, int] | None = None


def write_status(run: Path, status: Status) -> None:
    write_atomically(run / FILE, json.dumps(asdict(status)) + "\n")


def read_status(run: Path) -> tuple[str, int]:
    """(a line for people, exit code: 0 finished, 75 stopped by a signal, 1 anything else)."""
    status = _read(run)
    if status is None:
        return f"{run}: no training has begun", 1
    line = f"{run}: {status.state}, step {status.step} of {status.steps}"
    if status.state == "running":
        line += " when it started; it is running, or was killed"
    return line, {"finished": 0, "stopped": Stopped.exit_code}.get(status.state, 1)


def read_mesh(run: Path) -> tuple[int, int, int] | None:
    """(dp, tp, domain) of the last job that trained; None if none has."""
    status = _read(run)
    return None if status is None else status.mesh


def _read(run: Path) -> Status | None:
    try:
        return read_json(run / FILE, Status, DataError, "the next training writes it anew")
    except FileNotFoundError:
        return None
