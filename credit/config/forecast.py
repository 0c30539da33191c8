"""The `forecast` block."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from credit.config.fields import Block, Count, Sources, Step, Text, parse_moment


class Forecast(Block):
    """What `credit forecast` makes: of the test period, or from one start."""

    lead: Step
    """Length of a forecast, such as "5d", or "6mo" where data.step is of months."""
    every: Count = 1
    """A forecast from every n-th start of the test period."""
    members: Count = 1
    """Of the ensemble from each start; more than one for a model that was trained by the crps."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: of the least validation loss."""
    start: str | None = None
    """One start in place of the test period's: a time in UTC, such as 2026-11-27T00, or 2026-11; or latest: the newest
    that is stored. No truth is needed; forcings that are not stored are taken from their climatology in the statistics.
    """
    source: Sources = []
    """Stores to start from in place of `data.path` or `data.sources`, such as the newest analysis: states and stored
    statics. A path each, or a block of path and names."""
    layout: Literal["weatherbench-x", "weatherbench2"] = "weatherbench-x"
    """Names of the store's dimensions: init_time and lead_time, or time and prediction_timedelta."""
    weights: Text | None = None
    """A file that `credit export` wrote, in place of the run's checkpoint."""

    @field_validator("start", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        if value is None or value == "latest":
            return value
        try:
            return parse_moment(value).isoformat(timespec="minutes")
        except ValueError as error:
            raise ValueError(f"neither latest nor a time: {error}") from None

    @model_validator(mode="after")
    def _from_one_start(self) -> Forecast:
        if self.source and self.start is None:
            raise ValueError("source is what one forecast starts from: set start, to a time or to latest")
        return self
