"""Pictures of a run: one forecast beside the truth, and the scores by lead time. Needs matplotlib (extra `plots`)."""

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
from credit.training.score import Scores

COLOURS = {"model": "#0b5fa5", "persistence": "#c4572b", "climatology": "#7a7a7a"}


def plot_map(config: Config, scores: Scores) -> Path:
    """map.png: truth, forecast and both errors of the first channel, about a day into the last forecast."""
    store = FieldStore(store_path(config))
    channel = store.channels(config.data.variables, config.data.levels)[0]
    lead = int(np.argmin(np.abs(np.array(scores.lead_hours) - 24)))
    with xr.open_zarr(forecast_path(config.run), chunks=None, consolidated=False) as forecasts:
        start = forecasts["init_time"].values[-1]
        field = forecasts[channel.variable].isel(init_time=-1, lead_time=lead)
        predicted = (field if channel.level is None else field.sel(level=channel.level)).values
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
    """scores.png: RMSE and ACC of every channel by lead time."""
    count = len(scores.channels)
    figure, axes = plt.subplots(2, count, figsize=(3.6 * count + 0.6, 5.6), layout="constrained", squeeze=False)
    for column, (name, unit) in enumerate(zip(scores.channels, scores.units, strict=True)):
        for row, (title, values) in enumerate(
            ((f"RMSE of {name} [{unit}]", scores.rmse), (f"ACC of {name}", scores.acc))
        ):
            axis = axes[row, column]
            for f, (forecast, colour) in enumerate(COLOURS.items()):
                if np.isfinite(values[f, :, column]).all():
                    axis.plot(scores.lead_hours, values[f, :, column], color=colour, label=forecast, marker=".", ms=3)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel("lead time [h]")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{config.model.name} on {config.data.path}: {scores.starts} forecasts of the test period", fontsize=11
    )
    return _save(figure, config.run / "scores.png")


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
