"""Normalisation statistics of the training period, area-weighted; written once, read by every rank."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from credit.config import Config, Data
from credit.data.grid import Grid
from credit.data.store import Channel, FieldStore, stored_names
from credit.errors import DataError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means and standard deviations by channel, over the sphere and the training period.

    Attributes:
        mean, std: of every channel that is read, by name.
        increment_std: root mean square of x(t + step) - x(t), of the predicted channels.
        climatology: mean over the training times, float32, (channel, latitude, longitude), of the predicted ones.
        origin: what they are of, see `origin_of`.
    """

    mean: dict[str, float]
    std: dict[str, float]
    increment_std: dict[str, float]
    climatology: xr.DataArray
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
            },
            coords={"channel": list(self.mean), "predicted": predicted},
            attrs={"origin": json.dumps(self.origin)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        dataset.to_netcdf(partial, engine="netcdf4")
        partial.rename(path)

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
            found = json.loads(loaded.attrs["origin"])
        except (OSError, KeyError, ValueError) as error:
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
        return cls(mean, std, increment_std, loaded["climatology"], found)

    def climatology_of(self, predicted: list[str], grid: Grid) -> np.ndarray:
        """(channel, latitude, longitude) of these channels, in their order and the grid's."""
        places = {"latitude": grid.latitude, "longitude": grid.longitude}
        # Nearest within rounding, as `origin_of` rounds: a store may have its coordinates in float32.
        return self.climatology.sel(predicted=predicted).sel(places, method="nearest", tolerance=1e-4).values


def origin_of(data: Data, grid: Grid) -> dict[str, str]:
    """What statistics depend on beside the fields: keys of the config, and the grid in any order."""
    places = [np.sort(axis.astype(np.float64)).round(4).tolist() for axis in (grid.latitude, grid.longitude)]
    return {
        "data.step": f"{data.step_hours} h",
        "data.train": " to ".join(map(str, data.train)),
        "data.gaps": data.gaps,
        "grid": hashlib.blake2b(json.dumps(places).encode(), digest_size=4).hexdigest(),
    }


def compute_statistics(config: Config, store: FieldStore, progress: Callable[[int, int], None]) -> Statistics:
    """Read the training period once; memory of two times of all channels.

    Sums are shifted by the first field's mean, so that the variance of a field far from zero does not cancel.
    """
    data = config.data
    predicted = store.channels(data.variables, data.levels)
    others = store.channels(stored_names([*data.forcings, *data.statics]))
    channels: list[Channel] = [*predicted, *others]
    starts = store.starts(data.train, data.step_hours, 1, data.gaps)
    successors = store.indices(store.times[starts] + np.timedelta64(data.step_hours, "h"))
    times = np.union1d(starts, successors)
    rows = range(store.grid.shape[0])
    weights = (store.grid.latitude_weights() / store.grid.shape[0] / store.grid.shape[1])[:, None]

    def average(fields: np.ndarray) -> np.ndarray:
        return (fields * weights).sum(axis=(-2, -1), dtype=np.float64)

    first = store.read(channels, times[:1].tolist(), rows)[0].astype(np.float64)
    shift = average(first)[:, None, None]
    total, square = np.zeros(len(channels)), np.zeros(len(channels))
    increment, mean_field = np.zeros(len(predicted)), np.zeros_like(first[: len(predicted)])
    later: dict[int, np.ndarray] = {}
    after = dict(zip(starts.tolist(), successors, strict=True))
    for done, time in enumerate(times.tolist()):
        field = store.read(channels, [time], rows)[0] - shift
        total += average(field)
        square += average(field**2)
        mean_field += field[: len(predicted)]
        if time in later:
            increment += average((field[: len(predicted)] - later.pop(time)) ** 2)
        if time in after:
            later[after[time]] = field[: len(predicted)]
        progress(done + 1, len(times))
    mean = total / len(times)
    std = np.sqrt(np.maximum(square / len(times) - mean**2, 0))
    names = [channel.name for channel in channels]
    constant = [name for name, deviation in zip(names, std, strict=True) if deviation == 0]
    if constant:
        raise DataError(f"{store.path}: {', '.join(constant)} is constant over the training period: leave it out")
    rms_increment = np.sqrt(increment / len(starts))
    return Statistics(
        dict(zip(names, (mean + shift[:, 0, 0]).tolist(), strict=True)),
        dict(zip(names, std.tolist(), strict=True)),
        dict(zip(names, rms_increment.tolist(), strict=False)),
        xr.DataArray(
            (mean_field / len(times) + shift[: len(predicted)]).astype(np.float32),
            dims=("predicted", "latitude", "longitude"),
            coords={"latitude": store.grid.latitude, "longitude": store.grid.longitude},
        ),
        origin_of(config.data, store.grid),
    )
