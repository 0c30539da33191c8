"""Rank 0's record of a run: CSV files and TensorBoard in the run directory, and a line of progress now and then."""

from __future__ import annotations

import csv
import importlib.util
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from credit.errors import ConfigError, CreditError, DataError

STEP_COLUMNS = ("step", "epoch", "loss", "gradient_norm", "learning_rate", "seconds", "waited")
EPOCH_COLUMNS = ("step", "epoch", "loss")
PROGRESS_EVERY_S = 10.0
Table = dict[str, np.ndarray]
"""Numbers by the head of their column."""


class _Csv:
    """A CSV file whose rows are keyed by step; rows after the step of a resume are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], first: int) -> None:
        rows: list[list[str]] = []
        if first and path.exists():
            try:
                with path.open(newline="", errors="replace") as stream:
                    old = [*csv.reader(stream)][1:]
            except csv.Error as error:
                raise DataError(f"is damaged: {error}", str(path), "move it away, and a new one begins") from None
            rows = [row for row in old if row and re.fullmatch("[0-9]{1,18}", row[0]) and int(row[0]) <= first]
        self._stream = path.open("w", newline="")
        self._writer = csv.writer(self._stream)
        self._writer.writerows([columns, *rows])
        self._stream.flush()

    def write(self, *values: Any) -> None:
        self._writer.writerow(values)
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def refuse_missing_tensorboard(wanted: bool) -> None:
    """Raise a ConfigError if TensorBoard is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "the package tensorboard is not installed",
            "trainer.tensorboard",
            "pip install 'credit-hpc[tracking]', or leave the key out",
        )


class _TensorBoard:
    """Scalars under the names of the CSV columns; those after the step of a resume are dropped."""

    def __init__(self, directory: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1, flush_secs=10)

    def write(self, group: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def read_log(run: Path) -> tuple[Table, Table]:
    """What a run has written: its steps, and its validations.

    Raises:
        DataError: if no training has begun, or a file is damaged.
    """
    if not (run / "log.csv").exists():
        raise DataError(f"there is no log in {run}: run `credit train` first")
    return _read(run / "log.csv", STEP_COLUMNS), _read(run / "valid.csv", EPOCH_COLUMNS)


def _read(path: Path, columns: tuple[str, ...]) -> Table:
    try:
        with path.open(newline="") as stream:
            heads, *rows = csv.reader(stream)
        values = np.array(rows, dtype=np.float64).reshape(-1, len(columns)).T
        if tuple(heads) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
    except (ValueError, csv.Error) as error:
        raise DataError(f"is damaged: {error}", str(path), "move it away, and a new one begins") from None
    return dict(zip(columns, values, strict=True))


class StepLog:
    """Writes and prints on one rank, does nothing on the others.

    Args:
        directory: the run directory.
        first: steps done before this run.
        steps: steps in all.
        active: true on the rank that writes.
        tensorboard: write for TensorBoard too.
    """

    def __init__(self, directory: Path, first: int, steps: int, active: bool, tensorboard: bool = False) -> None:
        self._active, self._steps = active, steps
        self._shown = time.monotonic()
        self._recent: deque[tuple[float, int, float, float]] = deque(maxlen=50)
        self._failed: OSError | None = None
        if active:
            self._train = _Csv(directory / "log.csv", STEP_COLUMNS, first)
            self._valid = _Csv(directory / "valid.csv", EPOCH_COLUMNS, first)
            self._board = _TensorBoard(directory, first) if tensorboard else None

    def step(
        self,
        step: int,
        epoch: int,
        loss: float,
        norm: float,
        rate: float,
        samples: int,
        seconds: float,
        waited: float,
    ) -> None:
        """One optimiser step that took `seconds`, and then so long a wait for the data of the next."""
        if not self._active:
            return
        values = (epoch, loss, norm, rate, seconds, waited)
        row = (step, epoch, repr(loss), repr(norm), f"{rate:.6g}", f"{seconds:.4f}", f"{waited:.4f}")
        self._write(self._train, row, "train", dict(zip(STEP_COLUMNS[1:], values, strict=True)))
        self._recent.append((time.monotonic(), samples, seconds, waited))
        self._last = f"epoch {epoch}  step {step}/{self._steps}  loss {loss:.4f}  rate {rate:.2e}"
        self._step = step
        if time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._show("")

    def epoch(self, epoch: int, step: int, valid_loss: float) -> None:
        if self._active:
            self._write(self._valid, (step, epoch, repr(valid_loss)), "valid", {"loss": valid_loss})
            self._show(f"  valid {valid_loss:.4f}")

    def _write(self, file: _Csv, row: tuple[Any, ...], group: str, values: dict[str, float]) -> None:
        """What the disk does not take is said by `check`, to all ranks at once."""
        try:
            file.write(*row)
            if self._board is not None:
                self._board.write(group, row[0], values)
        except OSError as error:
            self._failed = error

    def check(self) -> None:
        """Raise a CreditError if something could not be written."""
        if self._failed is not None:
            raise CreditError(f"the log cannot be written: {self._failed}. Is there room on the disk?")

    def close(self) -> None:
        if self._active:
            self._train.close()
            self._valid.close()
            if self._board is not None:
                self._board.close()

    def _show(self, extra: str) -> None:
        if not self._recent:  # this job has taken no step yet
            print(extra.strip(), flush=True)
            return
        self._shown = time.monotonic()
        elapsed = self._recent[-1][0] - self._recent[0][0]
        waited = sum(one[3] for one in self._recent)
        pace = f"  waiting for data {waited / (waited + sum(one[2] for one in self._recent)):.0%}"
        if elapsed > 0:
            per_step = elapsed / (len(self._recent) - 1)
            minutes, seconds = divmod(round((self._steps - self._step) * per_step), 60)
            pace += f"  {self._recent[-1][1] / per_step:.1f} samples/s  ETA {minutes}:{seconds:02d}"
        print(f"{self._last}{extra}{pace}", flush=True)


class Progress:
    """Progress of work in equal parts, printed on one rank every ten seconds, with the time left."""

    def __init__(self, total: int, what: str, active: bool) -> None:
        self._total, self._what, self._active = total, what, active
        self._done, self._begin, self._shown = 0, time.monotonic(), time.monotonic()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._active and now - self._shown > PROGRESS_EVERY_S:
            self._shown = now
            left = (now - self._begin) / self._done * (self._total - self._done)
            print(f"{self._what}: {self._done}/{self._total}  ETA {left:.0f} s", flush=True)
