"""The whole config, and what its blocks must have in common."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from credit.config.data import Data
from credit.config.fields import Block, File, or_dotted
from credit.config.forecast import Forecast
from credit.config.models import Model, Pangu
from credit.config.trainer import Trainer
from credit.steps import in_words, is_multiple

CONSTRAINTS = ("nonnegative", "conserve")


def _keys_of(value: Any) -> list[str]:
    return [*map(str, value)] if isinstance(value, dict) else []


class Constraint(BaseModel):
    """What a forecast must satisfy after each step, in training and in forecasts.

    `name` is nonnegative, conserve, or the dotted path of a module of the user's own; all other keys are arguments, as
    `credit.models.constraints` has them.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, or_dotted(CONSTRAINTS)]
    """nonnegative, conserve, or a dotted path."""


class Config(Block):
    """A whole config file."""

    run: File
    """The run directory (relative to the working directory): everything is written there and nowhere else."""
    data: Data
    """Which fields, from where."""
    model: Model
    """One of the package's own, by name, or a class by its dotted path."""
    constraints: list[Constraint] = []
    """What a forecast must satisfy after each step."""
    trainer: Trainer
    """How to train, and on which mesh."""
    forecast: Forecast
    """What `credit forecast` makes."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        lead, step = self.forecast.lead, self.data.step
        if not is_multiple(lead, step):
            raise ValueError(f"forecast.lead {in_words(lead)} is not a multiple of data.step {in_words(step)}")
        levels = len(self.data.levels)
        if isinstance(self.model, Pangu) and levels and self.model.levels != levels:
            raise ValueError(f"model.levels is {self.model.levels}, and data.levels names {levels}")
        loss = self.trainer.loss
        if self.forecast.members > loss.ensemble == 1:
            raise ValueError(
                f"forecast.members: {self.forecast.members} would all be the same: a model that is trained by "
                f"trainer.loss.kind: {loss.kind} gives one state; by crps it learns to give many"
            )
        if self.data.masked and loss.spectral:
            raise ValueError(f"trainer.loss.spectral: a latitude of {self.data.masked[0]} has gaps, and no waves")
        extra = [one.model_extra or {} for one in self.constraints]
        summed = [name for keys in extra for key in ("terms", "sources") for name in _keys_of(keys.get(key))]
        for variable in self.data.masked:
            if any(name == variable or name.startswith(f"{variable}_") for name in summed):
                raise ValueError(f"constraints: {variable} has gaps, and no mean over the globe")
        if self.data.is_region and loss.spectral:
            raise ValueError("trainer.loss.spectral: waves are those around the globe, and data.grid is region")
        if self.data.is_region and any(one.name == "conserve" for one in self.constraints):
            raise ValueError("constraints: conserve is of the globe; what a region holds flows in and out of it")
        if self.constraints and self.trainer.precision == "bf16":
            raise ValueError(
                "constraints hold within the rounding of a state, and trainer.precision: bf16 rounds it to 3 digits"
            )
        for name, given, known in (
            ("variables", loss.variables, self.data.predicted),
            ("levels", loss.levels, self.data.levels),
        ):
            unknown = [key for key in given if key not in known]
            if unknown:
                raise ValueError(f"trainer.loss.{name}: {unknown[0]} is not among data.{name}: {known}")
        return self

    @property
    def steps(self) -> int:
        """Of a forecast."""
        return int(self.forecast.lead // self.data.step)

    @property
    def noise_channels(self) -> int:
        """Inputs by which the members of an ensemble differ."""
        return int(self.trainer.loss.ensemble > 1)

    def model_channels(self, state: int, diagnostics: int) -> tuple[int, int]:
        """Channels into and out of the model, of so many of the state and of the diagnostics.

        In: the states of the history, the newest first, forcings, statics, noise. Out: the state, the diagnostics.
        """
        given = len(self.data.forcings) + len(self.data.statics) + self.noise_channels
        return state * self.data.history + given, state + diagnostics

    @property
    def stats_path(self) -> Path:
        return Path(self.data.stats) if self.data.stats else self.run / "stats.nc"

    def to_dict(self) -> dict[str, Any]:
        """As it would stand in a file."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Equal for equal configs, across processes."""
        return hashlib.blake2b(yaml.safe_dump(self.to_dict()).encode(), digest_size=8).hexdigest()
