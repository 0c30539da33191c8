"""The times of a store: instants, or months; told apart, put in order, and said."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import xarray as xr

from credit.errors import DataError
from credit.steps import of_months

ROUNDED = (
    (np.timedelta64(1, "h"), np.timedelta64(60, "s")),
    (np.timedelta64(5, "m"), np.timedelta64(30, "s")),
    (np.timedelta64(1, "m"), np.timedelta64(5, "s")),
)
"""Times are taken to whole hours, or minutes, if all are so close to one: days as floating-point numbers miss them."""
SHORTEST_MONTH = np.timedelta64(27, "D")
"""Between two times of a store of months, that are somewhere in February and March."""


def read_times(dataset: xr.Dataset, monthly: bool | None = False) -> tuple[np.ndarray, list[str]]:
    """The times of a data set, ascending, and what was done to them, in words.

    Args:
        monthly: of one state a month, such as its mean; None: if it looks like that.

    Returns:
        Instants as datetime64[ns], or months as datetime64[M], in which a month of any calendar and its neighbour are
        one apart.

    Raises:
        DataError: if they are no dates, of which an instant must be of the standard calendar; if they are not
            ascending, or several of a month, saying where.
    """
    time = dataset["time"]
    if not np.issubdtype(time.dtype, np.datetime64) and not hasattr(next(iter(time.values), None), "calendar"):
        raise DataError(f"time holds {time.dtype}, not dates: its units must be like 'hours since 1970-01-01'")
    missing = time.isnull().values
    if missing.any():
        raise DataError(f"time number {int(missing.argmax())} is missing")
    if monthly or (monthly is None and _looks_monthly(time.values)):
        times, notes = _as_months(dataset)
    else:
        times, notes = _as_instants(time.values)
    back = np.flatnonzero(times[1:] <= times[:-1])
    if len(back):
        first = int(back[0])
        word = "twice" if times[first] == times[first + 1] else "out of order"
        raise DataError(
            f"times must ascend: {when(times[first + 1])} comes {word}, at {first + 1} of {len(times)}, after "
            f"{when(times[first])} (xarray: dataset.sortby('time').drop_duplicates('time'))"
        )
    return times, notes


def _as_instants(times: np.ndarray) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    calendar = times[0].calendar if times.dtype == object else None
    if calendar in ("noleap", "365_day"):  # all of whose dates there are
        times = np.array([one.isoformat() for one in times], dtype="datetime64[ns]")
        notes.append(f"the calendar {calendar} has no 29 February: set data.gaps: skip, to leave out steps across it")
    elif calendar is not None:
        raise DataError(
            f"its calendar is {calendar}, and steps and the sun's place are counted in the standard one: "
            f"convert it (xarray: dataset.convert_calendar('standard')), and set data.gaps: skip; of monthly means set "
            f"data.step: 1mo"
        )
    times = times.astype("datetime64[ns]")
    for unit, near in ROUNDED:
        whole = _rounded(times, unit)
        apart = abs(times - whole).max(initial=np.timedelta64(0))
        if apart <= near:
            if apart > np.timedelta64(0):
                odd = int((times != whole).argmax())
                seconds = apart / np.timedelta64(1, "s")
                notes.append(
                    f"times are up to {seconds:.3g} seconds off: {when(times[odd])} was taken as {when(whole[odd])}"
                )
                times = whole
            break
    return times, notes


def _rounded(times: np.ndarray, unit: np.timedelta64) -> np.ndarray:
    """To the nearest whole unit since 1970."""
    length = unit.astype("timedelta64[ns]").astype(np.int64)
    return ((times.astype(np.int64) + length // 2) // length * length).astype(times.dtype)


def time_bounds(dataset: xr.Dataset) -> xr.DataArray | None:
    """From when to when each time is the mean, (time, 2), if there is CF's variable of that."""
    time = dataset["time"]
    bounds = dataset.get(time.attrs.get("bounds", ""))
    return bounds if bounds is not None and bounds.dtype == time.dtype and bounds.shape == (len(time), 2) else None


def _as_months(dataset: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """The months that times are in; where CF says from when to when each is the mean, those of the middles."""
    time = dataset["time"]
    stamps, notes = time.values, []
    bounds = time_bounds(dataset)
    if bounds is not None:
        begin, end = bounds.values.T
        stamps = begin + (end - begin) / 2
    times = _months_of(stamps)
    at_begin, of_stamps = _months_of(time.values), _begins(time.values)
    if (times != at_begin).any():
        odd = int((times != at_begin).argmax())
        notes.append(f"by its bounds the time {_said(time.values[odd])} is of {when(times[odd])}")
    elif not of_stamps.all():
        odd = int((~of_stamps).argmax())
        notes.append(f"times are months: {_said(time.values[odd])} was taken as {when(times[odd])}")
    same = np.flatnonzero(times[1:] == times[:-1])
    if len(same):
        month = times[same[0]]
        raise DataError(
            f"data.step is of months, and {when(month)} has {(times == month).sum()} times, from "
            f"{_said(time.values[same[0]])} on: give data.step in hours or minutes, or write the means of months "
            f"(xarray: dataset.resample(time='MS').mean())"
        )
    return times, notes


def _months_of(stamps: np.ndarray) -> np.ndarray:
    """A minute before its beginning is a month, too: days as floating-point numbers miss it."""
    if stamps.dtype != object:
        return (stamps + np.timedelta64(1, "m")).astype("datetime64[M]")
    soon = stamps + timedelta(minutes=1)
    return np.array([f"{one.year:04}-{one.month:02}" for one in soon], dtype="datetime64[M]")


def _begins(stamps: np.ndarray) -> np.ndarray:
    """True where a month begins."""
    return np.array([_said(one).endswith("-01T00:00") for one in stamps], bool)


def _looks_monthly(stamps: np.ndarray) -> bool:
    apart = np.diff(stamps)
    return len(apart) > 0 and bool(
        (apart >= SHORTEST_MONTH).all() and (np.diff(_months_of(stamps)).astype(int) > 0).all()
    )


def _said(stamp: Any) -> str:
    """Of a calendar of cftime's, too."""
    return when(stamp) if isinstance(stamp, np.datetime64) else stamp.isoformat(timespec="minutes")


def when(time: np.datetime64) -> str:
    """To the minute, or the second if there are any; of a month no more than that."""
    if of_months(time):
        return str(time)
    whole = time == time.astype("datetime64[m]")
    return str(np.datetime_as_string(time, "m" if whole else "s"))
