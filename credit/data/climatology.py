"""Forcings at times that are not stored yet: their mean in the training period, by month and hour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from credit.data.grid import Grid, middle_of, on_grid
from credit.errors import DataError
from credit.steps import of_months

MONTHS = 12


@dataclass(frozen=True, eq=False)
class ForcingClimatology:
    """Means by month and hour of the day, and between the middles of two months what lies between them; the mean of a
    time's own month where the training period has nothing of the other, and where times are months.

    Attributes:
        means: float32, (forcing, month, hour, latitude, longitude); not finite where the training period has none.
    """

    means: xr.DataArray

    def on(self, grid: Grid) -> ForcingClimatology:
        """In the order of a grid, by place, within rounding."""
        return ForcingClimatology(on_grid(self.means, grid)) if self.means.size else self

    def at(self, name: str, times: np.ndarray, rows: range) -> np.ndarray:
        """One forcing: float32, (time, row, longitude).

        Raises:
            DataError: if there is no mean of such an hour, or month.
        """
        hours = (times - times.astype("datetime64[D]")) / np.timedelta64(1, "h")
        known = self.means["hour"].values if "hour" in self.means.coords else np.zeros(0)
        fields = []
        for time, hour in zip(times, hours, strict=True):
            if name not in self.means["forcing"].values or hour not in known:
                raise DataError(
                    f"{name} is not stored at {time}, and the statistics have no climatology of {hour:g} h of it"
                )
            means = self.means.sel(forcing=name, hour=hour)
            own, other, part = _months(time)
            if np.isnan(means.isel(month=own)).all():
                raise DataError(
                    f"{name} is not stored at {time}, and the training period has nothing of month {own + 1} to "
                    f"take in its place"
                )
            if np.isnan(means.isel(month=other)).all():
                part = 0.0
            near = means.isel(latitude=slice(rows.start, rows.stop))
            field = near.isel(month=own).values
            if part:
                field = (1 - part) * field + part * near.isel(month=other).values
            fields.append(field.astype(np.float32))
        return np.stack(fields)


def _months(time: np.datetime64) -> tuple[int, int, float]:
    """The month of a time, from 0, its neighbour on the nearer side, and the part of the way from middle to middle."""
    month = time.astype("datetime64[M]")
    if of_months(time):
        return int(month.astype(int)) % MONTHS, int(month.astype(int)) % MONTHS, 0.0
    middle = middle_of(month)
    side = 1 if time >= middle else -1
    part = (time - middle) / (middle_of(month + side) - middle)
    number = int(month.astype(int))
    return number % MONTHS, (number + side) % MONTHS, float(part)


class MeansByHour:
    """Collects `ForcingClimatology.means`, a field at a time."""

    def __init__(self, names: list[str], grid: tuple[int, int]) -> None:
        self._names, self._grid = names, grid
        self._sums: dict[tuple[int, float], np.ndarray] = {}
        self._counts: dict[tuple[int, float], int] = {}

    def add(self, time: np.datetime64, fields: np.ndarray) -> None:
        """(forcing, latitude, longitude) at a time."""
        if not self._names:
            return
        hour = float((time - time.astype("datetime64[D]")) / np.timedelta64(1, "h"))
        key = int(time.astype("datetime64[M]").astype(int) % MONTHS), hour
        if key not in self._sums:
            self._sums[key], self._counts[key] = np.zeros((len(self._names), *self._grid)), 0
        self._sums[key] += fields
        self._counts[key] += 1

    def means(self, latitude: np.ndarray, longitude: np.ndarray) -> xr.DataArray:
        hours = sorted({hour for _, hour in self._sums})
        values = np.full((len(self._names), MONTHS, len(hours), *self._grid), np.nan, np.float32)
        for (month, hour), total in self._sums.items():
            values[:, month, hours.index(hour)] = total / self._counts[month, hour]
        return xr.DataArray(
            values,
            dims=("forcing", "month", "hour", "latitude", "longitude"),
            coords={"forcing": self._names, "hour": hours, "latitude": latitude, "longitude": longitude},
        )
