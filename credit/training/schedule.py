"""The learning rate of each step: a function of the step, so that a resumed run has the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from credit.config import Trainer
from credit.dotted import load_dotted
from credit.errors import ConfigError

FACTORS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov & Hutter 2017, without restarts
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""From the part of the steps after the warm-up that is done to a factor."""


class Schedule:
    """A linear warm-up, then `trainer.schedule`.

    Epochs that are added to a finished run are a stage of their own, with another warm-up and the whole schedule.

    Args:
        stages: epochs in all at the end of each stage, ascending.
        steps_per_epoch: of the optimiser.

    Raises:
        ConfigError: if the schedule's dotted path leads to nothing that gives a factor.
    """

    def __init__(self, trainer: Trainer, stages: Sequence[int], steps_per_epoch: int) -> None:
        self._trainer = trainer
        self._ends = [epochs * steps_per_epoch for epochs in stages]
        self._factor = FACTORS.get(trainer.schedule) or _own(trainer.schedule)

    def rate(self, step: int) -> float:
        """Of step number `step`, from 0."""
        trainer = self._trainer
        begin = max([0, *(end for end in self._ends if end <= step)])
        end = next(end for end in self._ends if end > step)
        step -= begin
        if step < trainer.warmup_steps:
            return trainer.learning_rate * (step + 1) / trainer.warmup_steps
        done = (step - trainer.warmup_steps) / max(end - begin - trainer.warmup_steps, 1)
        return trainer.learning_rate * self._factor(done)


def _own(path: str) -> Callable[[float], float]:
    where = "trainer.schedule"
    factor = load_dotted(path, where)
    try:
        given = [float(factor(done)) for done in (0.0, 0.5, 1.0)]
    except Exception as error:
        raise ConfigError(
            f"{where}: {path} must take the part of the steps that is done, from 0 to 1, and give a factor of "
            f"trainer.learning_rate; it raised {type(error).__name__}: {error}"
        ) from error
    if not all(0 <= one < math.inf for one in given):
        raise ConfigError(f"{where}: {path} gives the factors {given} at 0, 0.5 and 1")
    return factor
