"""Fields on disk, in one store or several, of which a rank reads its own latitude rows only."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from credit.config import Source
from credit.data.climatology import ForcingClimatology
from credit.data.grid import COS_ZENITH, STATIC_FIELDS, Grid, cos_zenith
from credit.data.opening import expand
from credit.data.piece import Piece, same_units
from credit.data.shared import SharedReads
from credit.data.times import when
from credit.errors import DataError
from credit.steps import in_words, later


@dataclass(frozen=True)
class Channel:
    """One horizontal field: a variable, at a level if it has levels."""

    variable: str
    level: float | None = None

    @property
    def name(self) -> str:
        return self.variable if self.level is None else f"{self.variable}_{self.level:g}"


class FieldStore:
    """Global fields in zarr stores and netCDF files: the times of a variable may be in several of them, as yearly files
    are, and each variable in others.

    Args:
        paths: of one, or several; patterns and addresses as in `data.path`, or sources as in `data.sources`.
        variables: those that are wanted: times are those at which all of them are there. All by default.
        missing, region, monthly: see `Piece`.
        hold: how long a value of some variables holds, that are stored less often.

    Attributes:
        path: the first path, for messages.
        grid: the latitude-longitude grid.
        times: ascending, see `read_times`.
        notes: what was taken otherwise than it stands in the stores, in words.

    Raises:
        DataError: if a store is missing, cannot be opened, or has no such axes; if they do not fit together.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Source],
        variables: Sequence[str] | None = None,
        missing: Mapping[str, Any] | None = None,
        region: bool = False,
        hold: Mapping[str, np.timedelta64] | None = None,
        monthly: bool = False,
    ) -> None:
        self._hold = dict(hold or {})
        given = [str(paths)] if isinstance(paths, str | Path) else paths
        sources = [one if isinstance(one, Source) else Source(path=[one]) for one in given]
        self._pieces = [
            Piece(path, missing, region, monthly, one.names) for one in sources for path in expand(one.path)
        ]
        for source in sources:
            self._refuse_other_names(source.names)
        first = self._pieces[0]
        more = len(self._pieces) - 1
        self.path = Path(first.path)
        self._words = first.path if not more else f"{first.path} and {more} more"
        self.grid: Grid = first.grid
        self.notes = [*dict.fromkeys(note for piece in self._pieces for note in piece.notes)]
        for piece in self._pieces[1:]:
            if not piece.grid.is_like(self.grid):
                raise DataError(f"{piece.path} has another grid than {first.path}: {piece.grid} and {self.grid}")
        names = [*dict.fromkeys(name for piece in self._pieces for name in piece.variables)]
        self._places = {name: self._places_of(name) for name in names}
        asked = names if variables is None else variables
        wanted = [name for name in asked if name in self._places and name not in self._hold]
        moving = {name: times for name in wanted if (times := self._places[name].times) is not None}
        if not moving:
            raise DataError(f"{self._words}: nothing has a time coordinate along an axis: {', '.join(names)}")
        self.times = functools.reduce(np.intersect1d, moving.values())
        if len(self.times) == 0:
            each = [f"{name} {when(t[0])} to {when(t[-1])}" if len(t) else f"{name} none" for name, t in moving.items()]
            raise DataError(f"{self._words}: there is no time at which all is there: {', '.join(each)}")

    def __str__(self) -> str:
        return self._words

    def share(self, shared: SharedReads | None) -> None:
        """Read from now on together with others of this node; None: alone."""
        for piece in self._pieces:
            piece.shared = shared

    def _refuse_other_names(self, names: Mapping[str, str]) -> None:
        """Raise a DataError if none of the stores that have a source's names has one of them."""
        pieces = [piece for piece in self._pieces if piece.names is names]
        for name, ours in names.items():
            if not any(ours in piece.variables for piece in pieces):
                known = [one for piece in pieces for one in piece.stored_names]
                raise DataError(
                    f"{pieces[0].path} has no variable {name!r}, to be called {ours!r}{_suggest(name, known)}"
                )

    def _places_of(self, name: str) -> _Places:
        """Where the times of a variable are.

        Raises:
            DataError: if one is in two pieces.
        """
        pieces = [i for i, piece in enumerate(self._pieces) if name in piece.variables]
        moving = [i for i in pieces if "time" in self._pieces[i].variables[name]]
        if not moving:
            return _Places(None, np.array(pieces), np.zeros(len(pieces), int))
        if len(moving) < len(pieces):
            apart = [self._pieces[i].path for i in (moving[0], next(i for i in pieces if i not in moving))]
            raise DataError(f"{name} is along time in {apart[0]} and not in {apart[1]}: leave one of them out")
        units = [(self._pieces[i].path, str(self._pieces[i].attributes(name).get("units", ""))) for i in moving]
        first, its = next((one for one in units if one[1]), units[0])
        for path, unit in units:
            if not same_units(unit, its):
                raise DataError(f"{name} is in {its} in {first} and in {unit} in {path}: convert one of them")
        each = [times for i in moving if (times := self._pieces[i].times) is not None]
        owner = np.repeat(moving, [len(times) for times in each])
        within = np.concatenate([np.arange(len(times)) for times in each])
        times = np.concatenate(each)
        order = np.argsort(times, kind="stable")
        times, owner, within = times[order], owner[order], within[order]
        twice = np.flatnonzero(times[1:] == times[:-1])
        if len(twice):
            two = [self._pieces[owner[twice[0] + i]].path for i in (0, 1)]
            raise DataError(f"{name} at {when(times[twice[0]])} is in {two[0]} and in {two[1]}: leave one of them out")
        return _Places(times, owner, within)

    def channels(self, variables: Sequence[str], levels: Sequence[float] = ()) -> list[Channel]:
        """The channels of `variables`, those with a level axis at each of `levels`, in the order given.

        Raises:
            DataError: naming the variable or level that the store has not.
        """
        found: list[Channel] = []
        for name in variables:
            if name not in self._places:
                raise DataError(f"{self._words} has no variable {name!r}{_suggest(name, self._places)}")
            pieces = [self._pieces[owner] for owner in dict.fromkeys(self._places[name].owner.tolist())]
            flat = [piece for piece in pieces if "level" not in piece.variables[name]]
            if flat and len(flat) < len(pieces):
                raise DataError(f"{name} has no levels in {flat[0].path}, and elsewhere it has: leave one of them out")
            if flat:
                found.append(Channel(name))
                continue
            for piece in pieces:
                missing = [level for level in levels if not piece.has_level(name, level)]
                if missing or not levels:
                    what = f"no level {missing[0]:g}" if missing else "levels, and none are asked for (data.levels)"
                    stored = ", ".join(f"{one:g}" for one in piece.levels(name))
                    raise DataError(f"{piece.path}: {name} has {what}; stored: {stored}")
            found += [Channel(name, float(level)) for level in levels]
        return found

    def read(self, channels: Sequence[Channel], times: Sequence[int], rows: range) -> np.ndarray:
        """Fields at some times: float32, (time, channel, row, longitude). Reads `rows` and no others.

        Args:
            times: indices of `self.times`.

        Raises:
            DataError: see `Piece.read`.
        """
        return self.read_at(channels, self.times[list(times)], rows)

    def read_at(self, channels: Sequence[Channel], times: np.ndarray, rows: range) -> np.ndarray:
        """`read`, at times of which the variables' own stores need have no others.

        Raises:
            DataError: if one is not there; see `Piece.read`.
        """
        columns: list[np.ndarray] = []
        for name in dict.fromkeys(channel.variable for channel in channels):
            levels = [channel.level for channel in channels if channel.variable == name]
            columns.append(self._read_variable(name, levels, times, rows))
        return np.concatenate(columns, axis=1)

    def read_static(self, name: str, rows: range) -> np.ndarray:
        """A field without time: float32, (row, longitude).

        Raises:
            DataError: if it changes in time (at the first, middle and last that are stored).
        """
        channels = self.channels([name])
        times = self._places[name].times
        some = self.times[:1] if times is None else times[sorted({0, len(times) // 2, len(times) - 1})]
        fields = self.read_at(channels, some, rows)[:, 0]
        if not np.array_equal(fields, np.broadcast_to(fields[:1], fields.shape), equal_nan=True):
            raise DataError(
                f"{self._words}: {name} changes in time, and is among data.statics: give it as one of data.forcings"
            )
        return fields[0]

    def _read_variable(self, name: str, levels: list[float | None], times: np.ndarray, rows: range) -> np.ndarray:
        places = self._places[name]
        if places.times is None:
            first, *others = (self._pieces[i].read(name, levels, [0] * len(times), rows) for i in places.owner)
            for i, other in zip(places.owner[1:], others, strict=True):
                if not np.array_equal(first, other, equal_nan=True):
                    two = self._pieces[places.owner[0]].path, self._pieces[i].path
                    raise DataError(f"{name} is not the same in {two[0]} and in {two[1]}: leave one of them out")
            return first
        found = self._found(places.times, times, f"{name} at", self._hold.get(name))
        owners = places.owner[found]
        values = np.empty((len(times), len(levels), len(rows), self.grid.shape[1]), np.float32)
        for owner in dict.fromkeys(owners.tolist()):
            mine = owners == owner
            values[mine] = self._pieces[owner].read(name, levels, places.within[found[mine]].tolist(), rows)
        return values

    def indices(self, times: np.ndarray) -> list[int]:
        """Where these times are in the store.

        Raises:
            DataError: naming the first that is not there.
        """
        return self._found(self.times, times, "time").tolist()

    def _found(
        self, stored: np.ndarray, times: np.ndarray, what: str, hold: np.timedelta64 | None = None
    ) -> np.ndarray:
        """Where `times` are in `stored`, which ascend, or the last before that are less than `hold` old."""
        found, missing = _last(stored, times, hold)
        if missing.any():
            held = "" if hold is None else f" nor in the {in_words(hold)} before (data.hold)"
            raise DataError(f"{self._words} has no {what} {when(times[missing][0])}{held}")
        return found

    def has(self, variable: str, times: np.ndarray) -> bool:
        """True if a variable is stored at all of these times."""
        places = self._places.get(variable)
        if places is None or places.times is None:
            return places is not None
        return not _last(places.times, times, self._hold.get(variable))[1].any()

    def attributes(self, variable: str) -> dict[str, Any]:
        """CF attributes of a variable; none if it is not stored."""
        places = self._places.get(variable)
        return {} if places is None else self._pieces[places.owner[0]].attributes(variable)

    def starts(
        self, period: Sequence[Any], step: np.timedelta64, steps: int, gaps: str, history: int = 1
    ) -> np.ndarray:
        """Indices of the times t of a period with t + step, ..., t + steps x step in it and in the store.

        Args:
            period: [from, to).
            gaps: "refuse" or "skip" times whose successor is missing from the store.
            history: states up to t that must be there, too: t - step, ... of more than one.

        Raises:
            DataError: at a gap that is not to be skipped, or if nothing is left.
        """
        begin, end = (np.datetime64(bound.replace(tzinfo=None), "ns") for bound in period)
        inside = np.flatnonzero((self.times >= begin) & (self.times < end))
        wanted = self.times[inside][:, None] + step * np.arange(1, steps + 1)
        stored = np.isin(wanted, self.times)
        gap = ~stored & (wanted < end) & (wanted < self.times[-1])
        before = self.times[inside][:, None] - step * np.arange(1, history)
        has_history = ((before >= begin) & np.isin(before, self.times)).all(axis=1)
        if gaps == "refuse" and gap.any():
            first = int(np.flatnonzero(gap.any(axis=1))[0])
            raise DataError(
                f"{self._words}: {when(self.times[inside[first]])} is not followed by a time "
                f"{in_words(step)} later ({gap[:, 0].sum()} such gaps in the period): complete the store, choose "
                f"data.step to fit it, or set data.gaps: skip"
            )
        starts = inside[(stored & (wanted < end)).all(axis=1) & has_history]
        if len(starts) == 0:
            after = f" after {history} states" if history > 1 else ""
            raise DataError(
                f"{self._words}: no sample of {steps} step(s) of {in_words(step)}{after} "
                f"between {period[0]} and {period[1]}; the store runs from {when(self.times[0])} to "
                f"{when(self.times[-1])}"
            )
        return starts


@dataclass(frozen=True, eq=False)
class _Places:
    """Of one variable: its times, ascending, and of each the piece and the place there; None if it has no time."""

    times: np.ndarray | None
    owner: np.ndarray
    within: np.ndarray


def _last(stored: np.ndarray, times: np.ndarray, hold: np.timedelta64 | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where in `stored` the last is that is not after each of `times`; true where it is too old, or there is none."""
    found = np.searchsorted(stored, times, side="right") - 1
    newest = stored[found]
    return found, (found < 0) | (times != newest if hold is None else times >= later(newest, hold))


def forcing_fields(
    store: FieldStore, names: Sequence[str], times: np.ndarray, rows: range, beyond: ForcingClimatology | None = None
) -> np.ndarray:
    """Forcings at `times`: float32, (time, forcing, row, longitude), computed ones and those in the store.

    Args:
        beyond: in place of what the store does not have.
    """
    fields = []
    for name in names:
        if name == COS_ZENITH:
            fields.append(cos_zenith(times, store.grid.latitude[rows.start : rows.stop], store.grid.longitude))
        elif beyond is None or store.has(name, times):
            fields.append(store.read_at(store.channels([name]), times, rows)[:, 0])
        else:
            fields.append(beyond.at(name, times, rows))
    shape = (len(times), 0, len(rows), store.grid.shape[1])
    return np.stack(fields, axis=1) if fields else np.zeros(shape, np.float32)


def static_fields(store: FieldStore, names: Sequence[str], rows: range) -> np.ndarray:
    """Statics: float32, (static, row, longitude), computed ones and those in the store."""
    latitude = np.deg2rad(store.grid.latitude[rows.start : rows.stop])[:, None]
    longitude = np.deg2rad(store.grid.longitude)[None, :]
    fields = [
        STATIC_FIELDS[name](latitude, longitude).astype(np.float32)
        if name in STATIC_FIELDS
        else store.read_static(name, rows)
        for name in names
    ]
    return np.stack(fields) if fields else np.zeros((0, len(rows), store.grid.shape[1]), np.float32)


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
