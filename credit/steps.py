"""Steps of time: so many minutes, or so many calendar months, which are not equally long. Light to import: numpy alone.

numpy has both, `timedelta64[m]` and `timedelta64[M]`, which it does not mix: months are added to `datetime64[M]`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from credit.bounds import MOST_HOURS, MOST_MONTHS

UNITS: dict[str, np.timedelta64] = {
    "min": np.timedelta64(1, "m"),
    "h": np.timedelta64(60, "m"),
    "d": np.timedelta64(24 * 60, "m"),
    "mo": np.timedelta64(1, "M"),
    "y": np.timedelta64(12, "M"),
}
"""What a step is counted in, as numpy has it."""


def parse_step(value: Any) -> np.timedelta64:
    """Minutes or months of "6h", "5d", "15min", "1mo" or "1y".

    Raises:
        ValueError: if it is no such step, or longer than a century.
    """
    if isinstance(value, np.timedelta64):
        return value
    found = re.fullmatch(r"([0-9]{1,19})(min|h|d|mo|y)", str(value).strip())
    if found is None or not int(found[1]):
        raise ValueError(f'{value!r} is not a duration; write it like "6h", "5d", "15min", "1mo" (a month) or "1y"')
    unit = UNITS[found[2]]
    most = MOST_MONTHS if of_months(unit) else MOST_HOURS * 60
    if int(found[1]) * int(unit.astype(int)) > most:
        longest = f"{MOST_MONTHS} months" if of_months(unit) else f"{MOST_HOURS} hours"
        raise ValueError(f"{value!r} is longer than {longest}")
    return int(found[1]) * unit


def of_months(step: np.timedelta64 | np.datetime64 | np.ndarray) -> bool:
    """True of a step of calendar months, and of times that are months."""
    return np.datetime_data(step.dtype)[0] == "M"


def to_text(step: np.timedelta64) -> str:
    """As `parse_step` takes it: "6h", "15min", "1mo"; one text for each step."""
    count, unit = _counted(step)
    return f"{count}{unit}"


def in_words(step: np.timedelta64) -> str:
    """For people: "6 h", "15 min", "1 month"."""
    count, unit = _counted(step)
    return f"{count} {unit}" if unit != "mo" else f"{count} month{'s' * (count != 1)}"


def _counted(step: np.timedelta64) -> tuple[int, str]:
    if of_months(step):
        return int(step.astype(int)), "mo"
    minutes = int(step / np.timedelta64(1, "m"))
    return (minutes, "min") if minutes % 60 else (minutes // 60, "h")


def is_multiple(whole: np.timedelta64, step: np.timedelta64) -> bool:
    """False, too, if one is of months and the other is not."""
    return of_months(whole) == of_months(step) and not (whole % step).astype(int)


def later(times: np.ndarray, step: np.timedelta64) -> np.ndarray:
    """Times one step later; of months, as far into the month as before."""
    if not of_months(step) or of_months(times):
        return times + step
    months = times.astype("datetime64[M]")
    return (months + step).astype(times.dtype) + (times - months)
