"""Judge forecasts by lead time: RMSE, bias, anomaly correlation, CRPS, spectra, against simple forecasts."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from credit.config import Config
from credit.data.prepare import load_fields_statistics, open_fields
from credit.data.statistics import mean_where_finite, refuse_other_gaps
from credit.data.store import Channel, FieldStore
from credit.errors import DataError
from credit.evaluation.forecast import forecast_path, lead_times, read_forecasts, valid_times
from credit.parallel.collectives import all_sum, together
from credit.steps import in_words, of_months
from credit.training.log import Progress
from credit.training.loss import crps

FORECASTS = ("model", "persistence", "climatology")
FIELDS = ("truth", *FORECASTS)
"""What spectra are of."""


@dataclass(eq=False)
class Sums:
    """What is added up over starts, so that parts scored apart make up the whole.

    Attributes:
        starts: (); their number.
        squares, errors, correlations, crps: (forecast, lead, channel).
        variances: (lead, channel); of an ensemble's members.
        power: (field, lead, channel, wavenumber).
    """

    starts: np.ndarray
    squares: np.ndarray
    errors: np.ndarray
    correlations: np.ndarray
    crps: np.ndarray
    variances: np.ndarray
    power: np.ndarray

    @classmethod
    def zero(cls, leads: int, channels: int, longitudes: int) -> Sums:
        squares, errors, correlations, crps = np.zeros((4, len(FORECASTS), leads, channels))
        variances = np.zeros((leads, channels))
        power = np.zeros((len(FIELDS), leads, channels, longitudes // 2 + 1))
        return cls(np.zeros(()), squares, errors, correlations, crps, variances, power)

    def add_over_ranks(self) -> None:
        for field in fields(self):
            all_sum(torch.from_numpy(getattr(self, field.name)))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores over all starts.

    Attributes:
        leads: timedelta64, (lead,); of months where the steps are.
        channels: names.
        rmse, bias: in the channel's units, (forecast, lead, channel), for `FORECASTS`; of an ensemble's mean. A bias is
            positive where the forecast is above the truth.
        acc: (forecast, lead, channel), of an ensemble's mean; NaN for climatology, whose anomaly is zero.
        crps: in the channel's units, (forecast, lead, channel); of one state the mean absolute error.
        spread: in the channel's units, (lead, channel), of the ensemble; zero if it is one state. It should be the RMSE
            of the mean (times sqrt(n / (n + 1)) for n members).
        power: in the channel's units squared, (field, lead, channel, wavenumber), for `FIELDS`.
        members: of the ensemble from each start.
        starts: number of forecasts.
    """

    leads: np.ndarray
    channels: list[str]
    units: list[str]
    rmse: np.ndarray
    bias: np.ndarray
    acc: np.ndarray
    crps: np.ndarray
    spread: np.ndarray
    power: np.ndarray
    members: int
    starts: int

    @property
    def lead_unit(self) -> str:
        """hours or months."""
        return "months" if of_months(self.leads) else "hours"

    def lead_numbers(self) -> list[float]:
        """So many of the unit, (lead,)."""
        return (self.leads / np.timedelta64(1, "M" if of_months(self.leads) else "h")).tolist()

    def lead_words(self) -> list[str]:
        """Of each, such as "24 h"."""
        return [in_words(lead) for lead in self.leads]

    def shown_leads(self) -> list[int]:
        """See `shown`."""
        return shown(self.leads)

    def day(self) -> int:
        """Place of the lead nearest to a day, or to a month."""
        return nearest_to_a_day(self.leads)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(heads of columns, one row a channel and shown lead)."""
        heads = ["channel", "lead", "RMSE model", "persistence", "climatology", "ACC model", "persistence"]
        heads += ["bias model", *(["CRPS model", "persistence", "spread"] if self.members > 1 else []), "unit"]
        rows, words = [], self.lead_words()
        for column, (name, unit) in enumerate(zip(self.channels, self.units, strict=True)):
            for i in self.shown_leads():
                numbers = [f"{value:.4g}" for value in self.rmse[:, i, column]]
                numbers += [f"{value:.3f}" for value in self.acc[:2, i, column]] + [f"{self.bias[0, i, column]:.2g}"]
                if self.members > 1:
                    numbers += [f"{value:.4g}" for value in (*self.crps[:2, i, column], self.spread[i, column])]
                rows.append([name, words[i], *numbers, unit])
        return heads, rows

    def table(self) -> str:
        """One line a channel and shown lead."""
        heads, rows = self.cells()
        wide = max(6, *(len(row[1]) for row in rows))
        widths = [max(len(head), 8) + head.endswith(" model") for head in heads[2:-1]]
        lines = []
        for name, lead, *numbers, unit in ([*heads[:-1], ""], *rows):
            shown = " ".join(f"{one:>{width}}" for one, width in zip(numbers, widths, strict=True))
            lines.append(f"{name:<10} {lead:>{wide}} {shown}   {unit}".rstrip())
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Every lead, as CSV."""
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(
                ["channel", "units", f"lead_{self.lead_unit}", "forecast", "rmse", "acc", "bias", "crps", "spread"]
            )
            for column, name in enumerate(self.channels):
                for i, lead in enumerate(self.lead_numbers()):
                    for f, forecast in enumerate(FORECASTS):
                        values = [score[f, i, column] for score in (self.rmse, self.acc, self.bias, self.crps)]
                        values.append(self.spread[i, column] if forecast == "model" else 0.0)
                        writer.writerow(
                            [name, self.units[column], f"{lead:.10g}", forecast, *(f"{value:.7g}" for value in values)]
                        )

    def save_spectra(self, path: Path) -> None:
        """The shown leads, as CSV."""
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["channel", "units", f"lead_{self.lead_unit}", "wavenumber", *FIELDS])
            leads = self.lead_numbers()
            for column, name in enumerate(self.channels):
                for i in self.shown_leads():
                    for wave, powers in enumerate(self.power[:, i, column].T):
                        of_fields = [f"{power:.7g}" for power in powers]
                        writer.writerow([name, self.units[column], f"{leads[i]:.10g}", wave, *of_fields])


def whole_days(leads: np.ndarray) -> list[int]:
    """Places of every day, or of months of every year."""
    round_number = np.timedelta64(*((12, "M") if of_months(leads) else (24, "h")))
    return np.flatnonzero(leads % round_number == leads - leads).tolist()


def shown(leads: np.ndarray) -> list[int]:
    """Places of every day, or year of months, and of the first and last lead."""
    return sorted({0, *whole_days(leads), len(leads) - 1})


def nearest_to_a_day(leads: np.ndarray) -> int:
    """Place of the lead nearest to a day, or to a month."""
    return int(np.abs(leads - np.timedelta64(*((1, "M") if of_months(leads) else (24, "h")))).argmin())


def score(config: Config, rank: int = 0, ranks: int = 1) -> Scores:
    """Compare `forecast.zarr` in the run directory with the store; several ranks share the starts.

    RMSE is the root of the mean over starts of the area-weighted squared error, bias the mean error. ACC is the
    area-weighted correlation of anomalies from the training period's mean, not centred, averaged over starts (as in
    Rasp et al. 2024, WeatherBench 2, section 3). CRPS is the mean of `crps`, spread the root of the mean
    (unbiased) variance of the members. The power of a zonal wave is its part in the mean square along a latitude,
    averaged over area, starts and members: over all wavenumbers it adds up to the mean square of the field. Of a
    region all but the boundary is scored, and there are no waves.

    Raises:
        DataError: if there is no forecast.
    """
    with together("scoring"):
        path = forecast_path(config.run)
        if not path.exists():
            raise DataError(f"there is no forecast at {path}: run `credit forecast` first")
        store = open_fields(config)
        channels = store.channels(config.data.predicted, config.data.levels)
        names = [channel.name for channel in channels]
        climatology = load_fields_statistics(config, store).climatology_of(names, store.grid)
        with read_forecasts(path) as forecasts:
            leads, members = lead_times(forecasts), forecasts.sizes.get("number", 1)
            sums = Sums.zero(len(leads), len(channels), store.grid.shape[1])
            mine = range(rank, forecasts.sizes["init_time"], ranks)
            progress = Progress(len(mine), "score", active=rank == 0)
            weights = store.grid.cell_weights(config.data.boundary), store.grid.cell_weights()
            for number in mine:
                _add(sums, weights, climatology, _fields_of(forecasts, store, channels, number))
                progress.advance()
    sums.add_over_ranks()
    if store.grid.region:  # there are no waves around it
        sums.power[:] = np.nan
    sums.correlations[FORECASTS.index("climatology")] = np.nan
    return Scores(
        leads=leads,
        channels=[channel.name for channel in channels],
        units=[store.attributes(channel.variable).get("units", "") for channel in channels],
        rmse=np.sqrt(sums.squares / sums.starts),
        bias=sums.errors / sums.starts,
        acc=sums.correlations / sums.starts,
        crps=sums.crps / sums.starts,
        spread=np.sqrt(sums.variances / sums.starts),
        power=sums.power / sums.starts,
        members=members,
        starts=int(sums.starts),
    )


def _add(
    sums: Sums,
    areas: tuple[np.ndarray, np.ndarray],
    climatology: np.ndarray,
    leads: Iterator[tuple[np.ndarray, ...]],
) -> None:
    """Add one start: of each lead the (begin, truth, members), (channel, latitude, longitude) each, float64.

    Args:
        areas: parts in it of the cells that are scored, and of all.
    """
    weights, rows = areas[0], areas[1] * climatology.shape[-1]

    def average(product: np.ndarray) -> np.ndarray:
        return mean_where_finite(product, weights)

    def spectrum(field: np.ndarray) -> np.ndarray:
        return (zonal_power(field) * rows).sum(axis=-2)

    of_climatology = spectrum(climatology.astype(np.float64))
    of_begin = None
    for lead, (begin, truth, members) in enumerate(leads):
        anomaly = truth - climatology
        for f, ensemble in enumerate((members, begin[None], climatology[None])):
            sums.crps[f, lead] += average(
                crps(torch.from_numpy(ensemble)[None], torch.from_numpy(truth)[None])[0].numpy()
            )
            candidate = ensemble.mean(axis=0)
            error, of_forecast = candidate - truth, candidate - climatology
            sums.squares[f, lead] += average(error**2)
            sums.errors[f, lead] += average(error)
            if FORECASTS[f] != "climatology":
                scale = np.sqrt(average(of_forecast**2) * average(anomaly**2))
                sums.correlations[f, lead] += average(of_forecast * anomaly) / scale
        of_begin = spectrum(begin) if of_begin is None else of_begin
        if len(members) > 1:
            sums.variances[lead] += average(members.var(axis=0, ddof=1))
        of_members = np.mean([spectrum(member) for member in members], axis=0)
        sums.power[:, lead] += spectrum(truth), of_members, of_begin, of_climatology
    sums.starts += 1


def zonal_power(field: np.ndarray) -> np.ndarray:
    """(..., longitude) to (..., longitude // 2 + 1): the part of each wave in the mean square (Parseval)."""
    times = np.full(field.shape[-1] // 2 + 1, 2.0)
    times[0] = 1
    if field.shape[-1] % 2 == 0:
        times[-1] = 1
    return np.abs(np.fft.rfft(field, axis=-1, norm="forward")) ** 2 * times


def _fields_of(forecasts: xr.Dataset, store: FieldStore, channels: list[Channel], number: int) -> Iterator[Any]:
    """One lead after the other: a start of all leads may not fit into memory."""
    start, rows = forecasts["init_time"].values[number], range(store.grid.shape[0])
    begin, *times = store.indices(np.concatenate([[start], valid_times(start, lead_times(forecasts))]))
    before = store.read(channels, [begin], rows)[0].astype(np.float64)
    for lead, time in enumerate(times):
        fields = [forecasts[channel.variable].isel(init_time=number, lead_time=lead) for channel in channels]
        levels = [channel.level for channel in channels]
        values = [
            (field if level is None else field.sel(level=level)).values.reshape(-1, *store.grid.shape)
            for field, level in zip(fields, levels, strict=True)
        ]
        members = np.stack(values, axis=1).astype(np.float64)
        truth = store.read(channels, [time], rows)[0].astype(np.float64)
        for member in members:
            refuse_other_gaps(np.isfinite(member), np.isfinite(truth), channels, store.times[time])
        yield before, truth, members
