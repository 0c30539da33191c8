"""Normalisation statistics of the training period, area-weighted; written once, read by every rank."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from credit.config import Config, Data
from credit.data.climatology import ForcingClimatology, MeansByHour
from credit.data.grid import Grid, on_grid
from credit.data.piece import same_units
from credit.data.store import Channel, FieldStore
from credit.data.times import when
from credit.errors import DataError
from credit.files import rename_synced
from credit.steps import in_words


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means and standard deviations by channel, over the sphere and the training period.

    Attributes:
        mean, std: of every channel that is read, by name.
        increment_std: root mean square of x(t + step) - x(t), of the predicted channels.
        climatology: mean over the training times, float32, (channel, latitude, longitude), of the predicted ones.
        forcings: in place of stored ones, at times that are not stored.
        units: of every variable that says so.
        origin: what they are of, see `origin_of`.
    """

    mean: dict[str, float]
    std: dict[str, float]
    increment_std: dict[str, float]
    climatology: xr.DataArray
    forcings: ForcingClimatology
    units: dict[str, str]
    origin: dict[str, str]

    @property
    def digest(self) -> str:
        """Of all the numbers that training uses."""
        numbers = json.dumps([self.mean, self.std, self.increment_std], sort_keys=True)
        return hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest()

    def arrays(self, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of some channels, float64."""
        return np.array([self.mean[name] for name in names]), np.array([self.std[name] for name in names])

    def save(self, path: Path) -> None:
        predicted = list(self.increment_std)
        dataset = xr.Dataset(
            {
                "mean": ("channel", list(self.mean.values())),
                "std": ("channel", list(self.std.values())),
                "increment_std": ("predicted", [self.increment_std[name] for name in predicted]),
                "climatology": self.climatology,
                "forcing_climatology": self.forcings.means.rename(latitude="row", longitude="column"),
            },
            coords={"channel": list(self.mean), "predicted": predicted},
            attrs={"origin": json.dumps(self.origin), "units": json.dumps(self.units)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        dataset.to_netcdf(partial, engine="netcdf4")
        rename_synced(partial, path)

    @classmethod
    def load(cls, path: Path, predicted: list[str], others: list[str], origin: dict[str, str]) -> Statistics:
        """Read what `save` wrote, for these channels.

        Raises:
            DataError: if the file is missing or damaged, is of something else than `origin`, or has no usable number
                for a channel.
        """
        remedy = "run `credit data stats CONFIG`"
        if not path.exists():
            raise DataError(f"there are no statistics at {path}: {remedy}")
        try:
            with xr.open_dataset(path, engine="netcdf4") as dataset:
                loaded = dataset.load()
            mean, std, increment_std = (
                dict(zip(loaded[axis].values.tolist(), loaded[name].values.tolist(), strict=True))
                for name, axis in (("mean", "channel"), ("std", "channel"), ("increment_std", "predicted"))
            )
            found, units = (dict(json.loads(loaded.attrs[name])) for name in ("origin", "units"))
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as statistics ({error}): {remedy}") from None
        other = [f"{key} {found.get(key)}, not {value}" for key, value in origin.items() if found.get(key) != value]
        if other:
            raise DataError(f"the statistics {path} are of {'; '.join(other)}: {remedy}, or name others in data.stats")
        missing = [name for name in (*predicted, *others) if name not in mean or name not in std]
        missing += [name for name in predicted if name not in increment_std]
        if missing:
            raise DataError(f"{path} has no statistics of {', '.join(dict.fromkeys(missing))}: {remedy}")
        unusable = [f"mean of {name} {mean[name]}" for name in (*predicted, *others) if not math.isfinite(mean[name])]
        for what, values, names in (("std", std, [*predicted, *others]), ("increment_std", increment_std, predicted)):
            unusable += [f"{what} of {name} {values[name]}" for name in names if not 0 < values[name] < math.inf]
        if unusable:
            raise DataError(f"{path} cannot be used, {', '.join(unusable)}: {remedy}")
        means = ForcingClimatology(loaded["forcing_climatology"].rename(row="latitude", column="longitude"))
        return cls(mean, std, increment_std, loaded["climatology"], means, units, found)

    def refuse_other_units(self, store: FieldStore, variables: list[str]) -> None:
        """Raise a DataError if a variable of `store` is in other units than the fields these are of."""
        for name in variables:
            unit = str(store.attributes(name).get("units", ""))
            if not same_units(unit, self.units.get(name, "")):
                raise DataError(
                    f"{name} is in {unit} in {store}, and the statistics are of {self.units[name]}: convert the field "
                    f"(or its units attribute, if that is wrong)"
                )

    def climatology_of(self, predicted: list[str], grid: Grid) -> np.ndarray:
        """(channel, latitude, longitude) of these channels, in their order and the grid's."""
        return on_grid(self.climatology.sel(predicted=predicted), grid).values


def mean_where_finite(fields: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over (latitude, longitude) of the values that are there, float64.

    Args:
        weights: see `Grid.cell_weights`.
    """
    there = np.isfinite(fields)
    if there.all():
        return (fields * weights).sum(axis=(-2, -1), dtype=np.float64)
    total = np.where(there, fields * weights, 0).sum(axis=(-2, -1), dtype=np.float64)
    return total / np.where(there, weights, 0).sum(axis=(-2, -1), dtype=np.float64)


def refuse_other_gaps(there: np.ndarray, wanted: np.ndarray, channels: list[Channel], time: np.datetime64) -> None:
    """Raise a DataError if values are missing at other places than those of the mask.

    Args:
        there, wanted: (channel, latitude, longitude).
    """
    if (there != wanted).any():
        channel = channels[int((there != wanted).any(axis=(-2, -1)).argmax())]
        raise DataError(
            f"{channel.name} is missing at other places at {when(time)} than in the training period: a mask is of "
            f"places that always are; give a number in data.missing"
        )


def origin_of(data: Data, grid: Grid) -> dict[str, str]:
    """What statistics depend on beside the fields: keys of the config, and the grid in any order."""
    places = [np.sort(axis.astype(np.float64)).round(4).tolist() for axis in (grid.latitude, grid.longitude)]
    return {
        "data.step": in_words(data.step),
        "data.train": " to ".join(map(str, data.train)),
        "data.gaps": data.gaps,
        **({"data.missing": json.dumps(data.missing, sort_keys=True)} if data.missing else {}),
        **({"data.grid": "region"} if grid.region else {}),
        "grid": hashlib.blake2b(json.dumps(places).encode(), digest_size=4).hexdigest(),
    }


def compute_statistics(config: Config, store: FieldStore, progress: Callable[[int, int], None]) -> Statistics:
    """Read the training period once; memory of two times of all channels.

    Raises:
        DataError: if a channel does not vary, or has gaps at some times and not at others.
    """
    data = config.data
    predicted = store.channels(data.predicted, data.levels)
    channels: list[Channel] = [*predicted, *store.channels(data.given)]
    starts = store.starts(data.train, data.step, 1, data.gaps)
    successors = store.indices(store.times[starts] + data.step)
    times, after = np.union1d(starts, successors), dict(zip(starts.tolist(), successors, strict=True))
    rows = range(store.grid.shape[0])
    names = [channel.name for channel in channels]
    first = store.read(channels, times[:1].tolist(), rows)[0].astype(np.float64)
    there = np.isfinite(first[: len(predicted)])
    sums = _Sums(first, len(predicted), store.grid.cell_weights())
    forcings = [name for name in data.forcings if name in data.given]
    by_hour = MeansByHour(forcings, store.grid.shape)
    for done, time in enumerate(times.tolist()):
        fields = store.read(channels, [time], rows)[0]
        refuse_other_gaps(np.isfinite(fields[: len(predicted)]), there, predicted, store.times[time])
        by_hour.add(store.times[time], fields[[names.index(name) for name in forcings]].astype(np.float64))
        sums.add(fields, time, after.get(time))
        progress(done + 1, len(times))
    mean, std, rms_increment = sums.moments(len(times), len(starts))
    _refuse_still(store, names, std, "is constant over the training period: leave it out")
    still = f"does not change in {in_words(data.step)}: give it as one of data.statics"
    _refuse_still(store, names, rms_increment, still)
    return Statistics(
        dict(zip(names, mean.tolist(), strict=True)),
        dict(zip(names, std.tolist(), strict=True)),
        dict(zip(names, rms_increment.tolist(), strict=False)),
        xr.DataArray(
            sums.mean_field(len(times)),
            dims=("predicted", "latitude", "longitude"),
            coords={"latitude": store.grid.latitude, "longitude": store.grid.longitude},
        ),
        ForcingClimatology(by_hour.means(store.grid.latitude, store.grid.longitude)),
        {name: str(store.attributes(name).get("units", "")) for name in dict.fromkeys(c.variable for c in channels)},
        origin_of(config.data, store.grid),
    )


class _Sums:
    """Over times, of fields (channel, latitude, longitude) less the first one's means, so that the variance of a field
    far from zero does not cancel.

    Args:
        predicted: how many of the channels, the first ones, are.
        weights: see `Grid.cell_weights`.
    """

    def __init__(self, first: np.ndarray, predicted: int, weights: np.ndarray) -> None:
        self._predicted, self._weights = predicted, weights
        self._shift = self._average(first)[:, None, None]
        self._total, self._square = np.zeros(len(first)), np.zeros(len(first))
        self._increment, self._fields = np.zeros(predicted), np.zeros_like(first[:predicted])
        self._later: dict[int, np.ndarray] = {}

    def _average(self, fields: np.ndarray) -> np.ndarray:
        return mean_where_finite(fields, self._weights)

    def add(self, fields: np.ndarray, time: int, successor: int | None) -> None:
        """Those of a time, by its number, and the number of the time one step later, if both are a sample."""
        fields = fields - self._shift
        self._total += self._average(fields)
        self._square += self._average(fields**2)
        state = fields[: self._predicted]
        self._fields += state
        if time in self._later:
            self._increment += self._average((state - self._later.pop(time)) ** 2)
        if successor is not None:
            self._later[successor] = state

    def moments(self, times: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mean, standard deviation, root mean square change in a step) of each channel."""
        mean = self._total / times
        std = np.sqrt(np.maximum(self._square / times - mean**2, 0))
        return mean + self._shift[:, 0, 0], std, np.sqrt(self._increment / steps)

    def mean_field(self, times: int) -> np.ndarray:
        """Of what is predicted, float32."""
        return (self._fields / times + self._shift[: self._predicted]).astype(np.float32)


def _refuse_still(store: FieldStore, names: Sequence[str], varies: np.ndarray, why: str) -> None:
    still = [name for name, amount in zip(names, varies, strict=False) if amount == 0]
    if still:
        raise DataError(f"{store}: {', '.join(still)} {why}")
