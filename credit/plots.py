"""Pictures of a run: one forecast beside the truth, scores by lead time, spectra. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from credit.config import Config
from credit.data.prepare import store_path
from credit.data.store import FieldStore
from credit.training.forecast import forecast_path
from credit.training.score import FIELDS, Scores

COLOURS = {"model": "#0b5fa5", "persistence": "#c4572b", "climatology": "#7a7a7a"}
MOST_CHANNELS = 12
"""In one picture, evenly out of more."""


def plot_map(config: Config, scores: Scores) -> Path:
    """map.png: truth, forecast and both errors of the first channel, about a day into the last forecast."""
    store = FieldStore(store_path(config))
    channel = store.channels(config.data.variables, config.data.levels)[0]
    lead = int(np.argmin(np.abs(np.array(scores.lead_hours) - 24)))
    with xr.open_zarr(forecast_path(config.run), chunks=None, consolidated=False) as forecasts:
        start = forecasts["init_time"].values[-1]
        field = forecasts[channel.variable].isel(init_time=-1, lead_time=lead)
        field = field if channel.level is None else field.sel(level=channel.level)
        predicted = field.values.reshape(-1, *store.grid.shape).mean(axis=0)
    valid = start + np.timedelta64(scores.lead_hours[lead], "h")
    times = store.indices(np.array([start, valid]))
    begin, truth = store.read([channel], times, range(store.grid.shape[0]))[:, 0]
    low, high = np.percentile(truth, [0.5, 99.5])
    error = np.percentile(np.abs(begin - truth), 99)
    panels = [
        (f"truth, {np.datetime_as_string(valid, 'h')}", truth, "viridis", low, high),
        (f"forecast, {scores.lead_hours[lead]} h", predicted, "viridis", low, high),
        ("forecast minus truth", predicted - truth, "RdBu_r", -error, error),
        ("persistence minus truth", begin - truth, "RdBu_r", -error, error),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), layout="constrained", sharex=True, sharey=True)
    for axis, (title, values, colours, lowest, highest) in zip(axes.flat, panels, strict=True):
        image = axis.pcolormesh(
            store.grid.longitude, store.grid.latitude, values, cmap=colours, vmin=lowest, vmax=highest, rasterized=True
        )
        axis.set_title(title, loc="left", fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.85)
    units = store.attributes(channel.variable).get("units", "")
    figure.suptitle(f"{channel.name} [{units}], {config.model.name}, {store.path.name}", fontsize=11)
    return _save(figure, config.run / "map.png")


def plot_scores(config: Config, scores: Scores) -> Path:
    """scores.png: RMSE, ACC and bias of every channel by lead time; of an ensemble also its spread and CRPS."""
    shown = _channels(scores)
    count = 4 if scores.members > 1 else 3
    size = (3.6 * len(shown) + 0.6, 2.6 * count)
    figure, axes = plt.subplots(count, len(shown), figsize=size, layout="constrained", squeeze=False)
    for column, channel in enumerate(shown):
        name, unit = scores.channels[channel], scores.units[channel]
        rows = (
            (f"RMSE of {name} [{unit}]", scores.rmse),
            (f"ACC of {name}", scores.acc),
            (f"bias of {name} [{unit}]", scores.bias),
            (f"CRPS of {name} [{unit}]", scores.crps),
        )
        for axis, (title, values) in zip(axes[:, column], rows[:count], strict=True):
            for f, (forecast, colour) in enumerate(COLOURS.items()):
                line = values[f, :, channel]
                if np.isfinite(line).all():
                    axis.plot(scores.lead_hours, line, color=colour, label=forecast, marker=".", ms=3)
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(alpha=0.3)
        if scores.members > 1:
            line = scores.spread[:, channel]
            axes[0, column].plot(scores.lead_hours, line, color=COLOURS["model"], ls="--", lw=1, label="model's spread")
            axes[3, column].set_ylim(bottom=0)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_ylim(top=1)
        axes[2, column].axhline(0, color="black", lw=0.6)
        axes[-1, column].set_xlabel("lead time [h]")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{config.model.name} on {config.data.path}: {scores.starts} forecasts of the test period", fontsize=11
    )
    return _save(figure, config.run / "scores.png")


def plot_spectra(config: Config, scores: Scores) -> Path:
    """spectra.png: power of the zonal waves of truth and forecast, at the first lead, after a day, and at the last."""
    shown = _channels(scores)
    day = int(np.argmin(np.abs(np.array(scores.lead_hours) - 24)))
    leads = sorted({0, day, len(scores.lead_hours) - 1})
    truth, model = FIELDS.index("truth"), FIELDS.index("model")
    size = (3.6 * len(shown) + 0.6, 4.0)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    waves = np.arange(1, scores.power.shape[-1])
    for axis, channel in zip(axes[0], shown, strict=True):
        power = scores.power[truth, leads[0], channel, 1:]
        axis.loglog(waves, power, color="black", lw=1.5, label="truth")
        axis.set_ylim(bottom=1e-8 * power.max())  # rounding aside
        for shade, lead in zip(np.linspace(0.4, 1, len(leads)), leads, strict=True):
            label = f"{config.model.name}, {scores.lead_hours[lead]} h"
            line = scores.power[model, lead, channel, 1:]
            axis.loglog(waves, line, color=COLOURS["model"], alpha=shade, lw=1, label=label)
        axis.set_title(f"power of {scores.channels[channel]} [({scores.units[channel]})²]", loc="left", fontsize=10)
        axis.set_xlabel("zonal wavenumber")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=9)
    return _save(figure, config.run / "spectra.png")


def _channels(scores: Scores) -> list[int]:
    """Places of the channels to draw."""
    count = len(scores.channels)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_CHANNELS)).round().astype(int)).tolist()


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
