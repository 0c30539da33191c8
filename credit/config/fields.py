"""Kinds of values in a config, with their bounds."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from credit.bounds import (
    FIRST_YEAR,
    LARGEST,
    LARGEST_VALUE,
    LAST_YEAR,
    MOST,
    MOST_CHANNELS,
    MOST_LAYERS,
    MOST_PROCESSES,
    MOST_STEPS,
)
from credit.steps import parse_step, to_text


class OfTheRun:
    """Marks a key that makes a run what it is: with another value none may resume or forecast from its checkpoints."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), "x-of-the-run": True}


OF_THE_RUN = OfTheRun()


class Block(BaseModel):
    """A part of a config: unknown keys are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
"""Strict: neither true nor 1.0 nor "1" is 1."""
CountOrNone = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Steps = Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)]
StepsOrNone = Annotated[int, Field(strict=True, ge=0, le=MOST_STEPS)]
Layers = Annotated[int, Field(strict=True, ge=1, le=MOST_LAYERS)]
LayersOrNone = Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)]
Channels = Annotated[int, Field(strict=True, ge=1, le=MOST_CHANNELS)]
EvenChannels = Annotated[int, Field(strict=True, ge=2, le=MOST_CHANNELS, multiple_of=2)]
Halvings = Annotated[int, Field(strict=True, ge=0, le=16)]
Processes = Annotated[int, Field(strict=True, ge=1, le=MOST_PROCESSES)]
ProcessesOrNone = Annotated[int, Field(strict=True, ge=0, le=MOST_PROCESSES)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[float, Field(strict=True, gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=LARGEST)]
Real = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST)]


def _is_a_value_or_mask(given: Any) -> Any:
    number = type(given) in (int, float) and abs(given) <= LARGEST_VALUE
    if not (number or given == "mask"):
        raise ValueError(f"must be a number of at most {LARGEST_VALUE:g}, or mask, got {reprlib.repr(given)}")
    return given


ValueOrMask = Annotated[float | Literal["mask"], BeforeValidator(_is_a_value_or_mask)]
"""A union's own words would name the kinds of pydantic."""


def _is_a_number_or_auto(given: Any) -> Any:
    if given != "auto" and not (type(given) is int and 1 <= given <= MOST_PROCESSES):
        raise ValueError(f"must be auto, or a number from 1 to {MOST_PROCESSES}, got {reprlib.repr(given)}")
    return given


ProcessesOrAuto = Annotated[Literal["auto"] | Processes, BeforeValidator(_is_a_number_or_auto)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A name or a path: one line, of something."""


def _is_text(given: Any) -> Any:
    if given == "" or (isinstance(given, str) and "\0" in given):
        raise ValueError(f"{given!r} is no name of a file")
    return given


File = Annotated[Path, BeforeValidator(_is_text)]
"""A name of a file may hold anything else, line breaks too."""


class Alone:
    """Marks a list of which one entry alone may stand in a file: for the schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        several = handler(core)
        return {"anyOf": [several["items"], several]}


class OrText:
    """Marks a block in whose place a text may stand in a file: for the schema."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "title": "path"}, handler(core)]}


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str | dict) else given


Paths = Annotated[list[Text], BeforeValidator(_as_list), Alone()]
"""Several, or one alone."""


class Source(Block):
    """Stores that have the same names of variables."""

    path: Annotated[Paths, Field(min_length=1)]
    """As `data.path`."""
    names: dict[Text, Text] = {}
    """What variables are called here, by their names in the stores, such as {t2m: 2m_temperature}."""

    @model_validator(mode="after")
    def _named_apart(self) -> Source:
        ours = [*self.names.values()]
        twice = [name for name in ours if ours.count(name) > 1]
        if twice:
            theirs = " and ".join(name for name, our in self.names.items() if our == twice[0])
            raise ValueError(f"names: {theirs} are both called {twice[0]}")
        return self


def _as_source(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


Sources = Annotated[list[Annotated[Source, BeforeValidator(_as_source), OrText()]], BeforeValidator(_as_list), Alone()]
"""Several, or one alone, of which a path will do."""


def parse_moment(given: Any) -> datetime:
    """A time in UTC, as stores have them; without a zone it is that; of a month its beginning. Numbers are none:
    seconds since 1970?

    Raises:
        ValueError: if it is no time of this calendar, or one that stores cannot hold.
    """
    try:
        is_month = isinstance(given, str) and re.fullmatch(r"\d{4}-\d{2}", given)
        moment = given if isinstance(given, datetime) else datetime.fromisoformat(f"{given}-01" if is_month else given)
    except (ValueError, TypeError):
        if type(given) is not date:
            raise ValueError(f"{given!r} is no date; write it like 2020-01-31 or 2020-01-31T06") from None
        moment = datetime.combine(given, time())
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"{moment} is not within the years {FIRST_YEAR} to {LAST_YEAR}")
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


Moment = Annotated[
    datetime,
    BeforeValidator(parse_moment),
    WithJsonSchema({"type": "string", "pattern": r"^\d{4}-\d\d", "title": "time, like 2020-01-31T06"}),
]
Period = tuple[Moment, Moment]


Step = Annotated[
    np.timedelta64,
    PlainValidator(parse_step),
    PlainSerializer(to_text, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^ *[0-9]+(min|h|d|mo|y) *$", "title": 'step, like "6h" or "1mo"'}),
]
"""A step of time, see `credit.steps`; written back as a text."""


def refuse_flag(given: Any) -> Any:
    if isinstance(given, bool):
        raise ValueError(f"{given} is no number")
    return given


def or_dotted(known: Sequence[str]) -> AfterValidator:
    """Of a string: one of these names, or the dotted path of something of the user's own."""

    def check(name: str) -> str:
        if name not in known and "." not in name:
            raise ValueError(f"{name!r} is neither one of {', '.join(known)} nor a dotted path")
        return name

    return AfterValidator(check)
