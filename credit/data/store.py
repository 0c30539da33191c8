"""Fields on disk (zarr or netCDF, through xarray), of which a rank reads its own latitude rows only."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from credit.container import binding_hint
from credit.data.grid import COS_ZENITH, STATIC_FIELDS, Grid, cos_zenith
from credit.errors import DataError

# Names that stores in the field use for the same axis.
_AXES = {
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
    "time": ("time", "valid_time"),
    "level": ("level", "pressure_level", "isobaricInhPa", "plev"),
}


@dataclass(frozen=True)
class Channel:
    """One horizontal field: a variable, at a level if it has levels."""

    variable: str
    level: float | None = None

    @property
    def name(self) -> str:
        return self.variable if self.level is None else f"{self.variable}_{self.level:g}"


class FieldStore:
    """A zarr store or netCDF file of global fields.

    Args:
        path: a zarr directory, or a netCDF file.

    Attributes:
        grid: the latitude-longitude grid.
        times: datetime64[ns], ascending.

    Raises:
        DataError: if the store is missing, cannot be opened, or has no such axes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        dataset = self._dataset
        self.grid = self._checked(lambda: Grid(dataset.latitude.values, dataset.longitude.values))
        self.times = dataset["time"].values
        if not np.issubdtype(self.times.dtype, np.datetime64) or np.any(np.diff(self.times) <= np.timedelta64(0)):
            raise DataError(f"{self.path}: time must be ascending dates")

    @cached_property
    def _dataset(self) -> xr.Dataset:
        return _open(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: whoever gets this opens them again, at the first read."""
        return {name: value for name, value in self.__dict__.items() if name != "_dataset"}

    def _checked(self, make):
        try:
            return make()
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def channels(self, variables: Sequence[str], levels: Sequence[float] = ()) -> list[Channel]:
        """The channels of `variables`, those with a level axis at each of `levels`, in the order given.

        Raises:
            DataError: naming the variable or level that the store has not.
        """
        found: list[Channel] = []
        for name in variables:
            if name not in self._dataset.data_vars:
                raise DataError(f"{self.path} has no variable {name!r}{_suggest(name, map(str, self._dataset))}")
            if "level" not in self._dataset[name].dims:
                found.append(Channel(name))
                continue
            stored = self._dataset["level"].values.tolist()
            missing = [level for level in levels if level not in stored]
            if missing or not levels:
                what = f"no level {missing[0]:g}" if missing else "levels, and data.levels names none"
                raise DataError(f"{self.path}: {name} has {what}; stored: {', '.join(f'{one:g}' for one in stored)}")
            found += [Channel(name, float(level)) for level in levels]
        return found

    def read(self, channels: Sequence[Channel], times: Sequence[int], rows: range) -> np.ndarray:
        """Fields at some times: float32, (time, channel, row, longitude). Reads `rows` and no others.

        Raises:
            DataError: at the first value that is not finite, saying which.
        """
        columns: list[np.ndarray] = []
        for name in dict.fromkeys(channel.variable for channel in channels):
            levels = [channel.level for channel in channels if channel.variable == name]
            columns.append(self._read_variable(name, levels, times, rows))
        return np.concatenate(columns, axis=1)

    def read_static(self, channels: Sequence[Channel], rows: range) -> np.ndarray:
        """Fields without a time axis: float32, (channel, row, longitude)."""
        return self.read(channels, [0], rows)[0]

    def _read_variable(self, name: str, levels: list, times: Sequence[int], rows: range) -> np.ndarray:
        selection = self._dataset[name].isel(latitude=slice(rows.start, rows.stop))
        if "time" in selection.dims:
            selection = selection.isel(time=list(times))
        else:
            selection = selection.expand_dims(time=len(times))
        if levels != [None]:
            index = self._dataset.indexes["level"].get_indexer(levels)
            selection = selection.isel(level=index)
        else:
            selection = selection.expand_dims(level=1)
        try:
            values = selection.transpose("time", "level", "latitude", "longitude").values.astype(np.float32)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: cannot read {name}: {error}") from None
        if not np.isfinite(values).all():
            self._refuse_not_finite(name, values, levels, times, rows)
        return values

    def _refuse_not_finite(self, name: str, values: np.ndarray, levels: list, times: Sequence[int], rows: range):
        time, level, row, column = np.argwhere(~np.isfinite(values))[0]
        at_level = "" if levels[level] is None else f" at level {levels[level]:g}"
        raise DataError(
            f"{self.path}: {name}{at_level} is {values[time, level, row, column]} at "
            f"{np.datetime_as_string(self.times[times[time]], 'm')}, latitude {self.grid.latitude[rows[row]]:g}, "
            f"longitude {self.grid.longitude[column]:g} ({(~np.isfinite(values)).sum()} such values in what was "
            f"read): fill the field before training, or leave the variable out"
        )

    def indices(self, times: np.ndarray) -> list[int]:
        """Where these times are in the store.

        Raises:
            DataError: naming the first that is not there.
        """
        found = np.searchsorted(self.times, times)
        missing = self.times[np.minimum(found, len(self.times) - 1)] != times
        if missing.any():
            raise DataError(f"{self.path} has no time {np.datetime_as_string(times[missing][0], 'm')}")
        return found.tolist()

    def attributes(self, variable: str) -> dict[str, Any]:
        """CF attributes of a variable."""
        return dict(self._dataset[variable].attrs)

    def starts(self, period: Sequence, step_hours: int, steps: int, gaps: str) -> np.ndarray:
        """Indices of the times t of a period with t + step, ..., t + steps x step in it and in the store.

        Args:
            period: [from, to).
            gaps: "refuse" or "skip" times whose successor is missing from the store.

        Raises:
            DataError: at a gap that is not to be skipped, or if nothing is left.
        """
        begin, end = (np.datetime64(bound.replace(tzinfo=None), "ns") for bound in period)
        step = np.timedelta64(step_hours, "h")
        inside = np.flatnonzero((self.times >= begin) & (self.times < end))
        wanted = self.times[inside][:, None] + step * np.arange(1, steps + 1)
        stored = np.isin(wanted, self.times)
        gap = ~stored & (wanted < end) & (wanted < self.times[-1])
        if gaps == "refuse" and gap.any():
            first = int(np.flatnonzero(gap.any(axis=1))[0])
            raise DataError(
                f"{self.path}: {np.datetime_as_string(self.times[inside[first]], 'm')} is not followed by a time "
                f"{step_hours} h later ({gap[:, 0].sum()} such gaps in the period): complete the store, choose "
                f"data.step to fit it, or set data.gaps: skip"
            )
        starts = inside[(stored & (wanted < end)).all(axis=1)]
        if len(starts) == 0:
            raise DataError(
                f"{self.path}: no sample of {steps} step(s) of {step_hours} h between {period[0]} and {period[1]}; "
                f"the store runs from {np.datetime_as_string(self.times[0], 'm')} to "
                f"{np.datetime_as_string(self.times[-1], 'm')}"
            )
        return starts


def forcing_fields(store: FieldStore, names: Sequence[str], times: np.ndarray, rows: range) -> np.ndarray:
    """Forcings at `times`: float32, (time, forcing, row, longitude), computed ones and those in the store."""
    fields = []
    for name in names:
        if name == COS_ZENITH:
            fields.append(cos_zenith(times, store.grid.latitude[rows.start : rows.stop], store.grid.longitude))
        else:
            fields.append(store.read(store.channels([name]), store.indices(times), rows)[:, 0])
    shape = (len(times), 0, len(rows), store.grid.shape[1])
    return np.stack(fields, axis=1) if fields else np.zeros(shape, np.float32)


def static_fields(store: FieldStore, names: Sequence[str], rows: range) -> np.ndarray:
    """Statics: float32, (static, row, longitude), computed ones and those in the store."""
    latitude = np.deg2rad(store.grid.latitude[rows.start : rows.stop])[:, None]
    longitude = np.deg2rad(store.grid.longitude)[None, :]
    fields = [
        STATIC_FIELDS[name](latitude, longitude).astype(np.float32)
        if name in STATIC_FIELDS
        else store.read_static(store.channels([name]), rows)[0]
        for name in names
    ]
    return np.stack(fields) if fields else np.zeros((0, len(rows), store.grid.shape[1]), np.float32)


def stored_names(names: Sequence[str]) -> list[str]:
    """Those of the forcings and statics that are read rather than computed."""
    return [name for name in names if name != COS_ZENITH and name not in STATIC_FIELDS]


def _suggest(name: str, known) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"


def _open(path: Path) -> xr.Dataset:
    if not path.exists():
        raise DataError(f"there is no {path} (data.path, relative to {Path.cwd()}){binding_hint(path)}")
    try:
        if path.is_dir():
            dataset = xr.open_zarr(path, chunks=None, consolidated=False)
        else:
            dataset = xr.open_dataset(path, engine="netcdf4", cache=False)
    except Exception as error:
        kind = "zarr store" if path.is_dir() else "netCDF file"
        raise DataError(f"{path} cannot be opened as a {kind}: {type(error).__name__}: {error}") from None
    for axis, names in _AXES.items():
        found = next((name for name in names if name in dataset.coords), None)
        if found is None and axis != "level":
            raise DataError(f"{path} has no {axis} coordinate; it has {', '.join(map(str, dataset.coords))}")
        if found not in (None, axis):
            dataset = dataset.rename({found: axis})
    return dataset
