"""Judge forecasts: RMSE and anomaly correlation by lead time, against persistence and climatology."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from credit.config import Config
from credit.data.prepare import load_fields_statistics, store_path
from credit.data.store import Channel, FieldStore
from credit.errors import DataError
from credit.training.forecast import forecast_path
from credit.training.log import Progress

FORECASTS = ("model", "persistence", "climatology")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores over all starts.

    Attributes:
        lead_hours: (lead,).
        channels: names.
        rmse: in the channel's units, (forecast, lead, channel), for `FORECASTS`.
        acc: (forecast, lead, channel); NaN for climatology, whose anomaly is zero.
        starts: number of forecasts.
    """

    lead_hours: list[int]
    channels: list[str]
    units: list[str]
    rmse: np.ndarray
    acc: np.ndarray
    starts: int

    def table(self) -> str:
        """One line a channel and lead: every day, and the first and last lead."""
        shown = [i for i, hours in enumerate(self.lead_hours) if hours % 24 == 0]
        shown = sorted({0, *shown, len(self.lead_hours) - 1})
        lines = [
            f"{'channel':<10} {'lead':>6}  {'RMSE model':>10} {'persistence':>11} {'climatology':>11}"
            f"  {'ACC model':>9} {'persistence':>11}",
        ]
        for column, (name, unit) in enumerate(zip(self.channels, self.units, strict=True)):
            for i in shown:
                model, persistence, climatology = self.rmse[:, i, column]
                lines.append(
                    f"{name:<10} {self.lead_hours[i]:>4} h  {model:>10.4g} {persistence:>11.4g} {climatology:>11.4g}"
                    f"  {self.acc[0, i, column]:>9.3f} {self.acc[1, i, column]:>11.3f}   {unit}"
                )
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["channel", "units", "lead_hours", "forecast", "rmse", "acc"])
            for column, name in enumerate(self.channels):
                for i, hours in enumerate(self.lead_hours):
                    for f, forecast in enumerate(FORECASTS):
                        rmse, acc = self.rmse[f, i, column], self.acc[f, i, column]
                        writer.writerow([name, self.units[column], hours, forecast, f"{rmse:.7g}", f"{acc:.7g}"])


def score(config: Config) -> Scores:
    """Compare `forecast.zarr` in the run directory with the store.

    RMSE is the root of the mean over starts of the area-weighted squared error. ACC is the area-weighted
    correlation of anomalies from the training period's mean, not centred, averaged over starts (as in
    Rasp et al. 2024, WeatherBench 2, section 3).

    Raises:
        DataError: if there is no forecast.
    """
    path = forecast_path(config.run)
    if not path.exists():
        raise DataError(f"there is no forecast at {path}: run `credit forecast` first")
    store = FieldStore(store_path(config))
    channels = store.channels(config.data.variables, config.data.levels)
    climatology = load_fields_statistics(config, store).climatology.values
    weights = (store.grid.latitude_weights() / store.grid.shape[0] / store.grid.shape[1])[:, None]

    def average(product: np.ndarray) -> np.ndarray:
        return (product * weights).sum(axis=(-2, -1), dtype=np.float64)

    with xr.open_zarr(path, chunks=None, consolidated=False) as forecasts:
        leads = forecasts["lead_time"].values
        squares = np.zeros((len(FORECASTS), len(leads), len(channels)))
        correlations = np.full_like(squares, np.nan)
        correlations[:2] = 0
        starts = forecasts["init_time"].values
        progress = Progress(len(starts), "score", active=True)
        for number, start in enumerate(starts):
            times = store.indices(np.concatenate([[start], start + leads]))
            truth = store.read(channels, times, range(store.grid.shape[0])).astype(np.float64)
            candidates = (
                _fields(forecasts, channels, number),
                np.broadcast_to(truth[:1], truth[1:].shape),
                np.broadcast_to(climatology, truth[1:].shape),
            )
            anomaly = truth[1:] - climatology
            for f, candidate in enumerate(candidates):
                squares[f] += average((candidate - truth[1:]) ** 2)
                if FORECASTS[f] != "climatology":
                    of_forecast = candidate - climatology
                    scale = np.sqrt(average(of_forecast**2) * average(anomaly**2))
                    correlations[f] += average(of_forecast * anomaly) / scale
            progress.advance()
    return Scores(
        lead_hours=(leads / np.timedelta64(1, "h")).astype(int).tolist(),
        channels=[channel.name for channel in channels],
        units=[store.attributes(channel.variable).get("units", "") for channel in channels],
        rmse=np.sqrt(squares / len(starts)),
        acc=correlations / len(starts),
        starts=len(starts),
    )


def _fields(forecasts: xr.Dataset, channels: list[Channel], start: int) -> np.ndarray:
    """(lead, channel, latitude, longitude) of one forecast."""
    fields = []
    for channel in channels:
        field = forecasts[channel.variable].isel(init_time=start)
        fields.append((field if channel.level is None else field.sel(level=channel.level)).values)
    return np.stack(fields, axis=1).astype(np.float64)
