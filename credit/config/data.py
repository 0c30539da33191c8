"""The `data` block."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from credit.config.fields import (
    OF_THE_RUN,
    Block,
    Count,
    CountOrNone,
    Flag,
    Paths,
    Period,
    Processes,
    ProcessesOrNone,
    Real,
    Source,
    Sources,
    Step,
    Text,
    ValueOrMask,
)
from credit.steps import of_months

COMPUTED = ("cos_zenith", "sin_latitude", "cos_latitude", "sin_longitude", "cos_longitude")
"""Forcings and statics that are functions of time and place."""


class Data(Block):
    """Which fields, from where."""

    path: Annotated[Paths, OF_THE_RUN] = []
    """Zarr stores and netCDF files (relative to the working directory): one, a list, patterns such as "era5_*.nc", or
    addresses (s3://, gs://, https://) of zarr stores; or "demo" or "era5-sample", which come with the package."""
    sources: Annotated[Sources, OF_THE_RUN] = []
    """In place of path, where stores have other names for the same: blocks of path and names."""
    variables: Annotated[list[Text], Field(min_length=1), OF_THE_RUN]
    """The state: what the model is given and predicts, by name in the store (or as sources call it)."""
    diagnostics: Annotated[list[Text], OF_THE_RUN] = []
    """What the model predicts and is not given, such as precipitation."""
    levels: Annotated[list[Real], OF_THE_RUN] = []
    """Levels to take of variables that have them, as the store numbers them."""
    statics: Annotated[list[Text], OF_THE_RUN] = []
    """Fields without time: from the store, or sin_latitude, cos_latitude, sin_longitude, cos_longitude."""
    forcings: Annotated[list[Text], OF_THE_RUN] = []
    """Given, not predicted, at the start of a step: from the store, or cos_zenith (the sun's)."""
    step: Annotated[Step, OF_THE_RUN]
    """Time from input to output, such as "6h", "15min" or "1mo". Of calendar months the stores have one state a month,
    such as its mean, wherever in the month its time is."""
    history: Annotated[Count, OF_THE_RUN] = 1
    """States that the model is given: the one it starts from, and those one step before, two, ..."""
    grid: Literal["region"] | tuple[Count, Count] | None = None
    """region: the stores are of a part of the globe, which is not wrapped around, and whose cells alone count. Or
    (latitudes, longitudes), to plan and check parity by where the stores are not here; levels are then taken to be of
    all variables whose names are not those of a surface field."""
    boundary: Annotated[CountOrNone, OF_THE_RUN] = 0
    """Rows and columns along the edges of a region where the state is given after each step, from the stores, and left
    out of loss and scores."""
    train: Annotated[Period, OF_THE_RUN]
    """The period [from, to) of training and of the statistics."""
    valid: Annotated[Period, OF_THE_RUN]
    """The period of validation, at the end of each epoch."""
    test: Period
    """The period of forecasts and scores. A sample belongs to the period that holds all its times."""
    gaps: Annotated[Literal["refuse", "skip"], OF_THE_RUN] = "refuse"
    """Times whose successor one step later is missing: refuse the store, or skip those times."""
    hold: Annotated[dict[str, Step], OF_THE_RUN] = {}
    """Of forcings that are stored less often than every step: how long a value holds, such as "1d" or "1mo"; the newest
    is taken, and none that is older than that."""
    missing: Annotated[dict[str, ValueOrMask], OF_THE_RUN] = {}
    """Of variables with values that are missing: a number to take in their place; or mask, of places that always are,
    such as land of a sea surface temperature: left out of loss, statistics and scores, and missing in forecasts."""
    stats: Text | None = None
    """Statistics written by `credit data stats`; stats.nc in the run directory by default."""
    in_memory: Flag = False
    """Read this rank's rows of the whole store once, and keep them."""
    workers: ProcessesOrNone = 0
    """Processes of each rank that read batches while it computes; 0: the rank reads."""
    prefetch: Processes = 2
    """Batches that each worker reads ahead."""

    @field_validator("train", "valid", "test")
    @classmethod
    def _forwards(cls, period: Period) -> Period:
        begin, end = period
        if begin >= end:
            raise ValueError(f"the period starts at {begin} and ends at {end}")
        return begin, end

    @model_validator(mode="after")
    def _apart(self) -> Data:
        periods = sorted([("train", self.train), ("valid", self.valid), ("test", self.test)], key=lambda p: p[1])
        for (name, period), (other, later) in itertools.pairwise(periods):
            if period[1] > later[0]:
                raise ValueError(f"{name} and {other} share times: scores would be of what was trained on")
        return self

    @model_validator(mode="after")
    def _is_somewhere(self) -> Data:
        if bool(self.path) == bool(self.sources):
            raise ValueError("say where the fields are, in one of path and sources")
        return self

    @property
    def stores(self) -> list[Source]:
        """Of either."""
        return self.sources or [Source(path=self.path)]

    @model_validator(mode="after")
    def _named_once(self) -> Data:
        names = [*self.predicted, *self.forcings, *self.statics]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            roles = [
                role for role in ("variables", "diagnostics", "forcings", "statics") if twice[0] in getattr(self, role)
            ]
            raise ValueError(f"{twice[0]} is named twice (in {', '.join(roles)}): a field has one role")
        unknown = [name for name in self.missing if name not in (*self.predicted, *self.given)]
        if unknown:
            raise ValueError(f"missing: {unknown[0]} is not among the variables that are read")
        levels = [f"{level:g}" for level in self.levels]
        same = [level for level in levels if levels.count(level) > 1]
        if same:
            raise ValueError(f"levels name {same[0]} twice (they are told apart by six digits)")
        return self

    @model_validator(mode="after")
    def _are_forcings(self) -> Data:
        others = [name for name in self.hold if name not in self.forcings or name in COMPUTED]
        if others:
            raise ValueError(f"hold: {others[0]} is not among the forcings that are read")
        if of_months(self.step) and any(not of_months(hold) for hold in self.hold.values()):
            raise ValueError("hold: data.step is of months, and so is how long a value holds")
        return self

    @model_validator(mode="after")
    def _of_a_region(self) -> Data:
        if self.boundary and not self.is_region:
            raise ValueError(f"boundary: {self.boundary} is of the edges of a region: set grid: region with it")
        return self

    @property
    def is_region(self) -> bool:
        return self.grid == "region"

    @property
    def assumed_grid(self) -> tuple[int, int] | None:
        return None if self.grid == "region" else self.grid

    @property
    def predicted(self) -> list[str]:
        """Variables that the model makes: the state, then the diagnostics."""
        return [*self.variables, *self.diagnostics]

    @property
    def given(self) -> list[str]:
        """Forcings and statics that are read, not computed."""
        return [name for name in (*self.forcings, *self.statics) if name not in COMPUTED]

    @property
    def masked(self) -> list[str]:
        """Predicted variables that are missing at some places."""
        return [name for name in self.predicted if self.missing.get(name) == "mask"]

    @model_validator(mode="after")
    def _reads_once(self) -> Data:
        if self.workers and self.in_memory:
            raise ValueError(f"in_memory leaves nothing to read for workers: {self.workers}; set one of the two")
        return self
