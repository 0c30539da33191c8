"""Pictures of a run: one forecast beside the truth, scores by lead time, spectra. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from credit.config import Config
from credit.data.prepare import open_fields
from credit.data.times import when
from credit.evaluation.forecast import forecast_path, lead_times, read_forecasts, valid_times
from credit.evaluation.score import FIELDS, Scores, whole_days
from credit.evaluation.series import series
from credit.training.log import read_log

COLOURS = {"model": "#0b5fa5", "persistence": "#c4572b", "climatology": "#7a7a7a"}
COASTS = Path(__file__).parent / "coasts.npz"
"""(longitude, latitude) of points, lines apart by NaN: Natural Earth, in the public domain."""
MOST_FIELDS, MOST_DAYS = 3, 4
"""Of one forecast that are drawn."""
MOST_CHANNELS = 12
"""In one picture, evenly out of more."""


def plot_training(config: Config) -> Path:
    """training.png: loss of every step and of validation, norm of the gradient, and learning rate."""
    steps, valid = read_log(config.run)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(2, 1, 1))
    axes[0].plot(steps["step"], steps["loss"], color=COLOURS["model"], lw=1, label="training")
    axes[0].plot(valid["step"], valid["loss"], color=COLOURS["persistence"], marker="o", label="validation")
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].plot(steps["step"], steps["gradient_norm"], color=COLOURS["model"], lw=1)
    axes[2].plot(steps["step"], steps["learning_rate"], color=COLOURS["model"], lw=1)
    for axis, title in zip(axes, ("loss", "norm of the gradient", "learning rate"), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis, name in zip(axes, ("loss", "gradient_norm"), strict=False):
        if (steps[name] > 0).all():
            axis.set_yscale("log")
    return _save(figure, config.run / "training.png")


def plot_map(config: Config, scores: Scores) -> Path:
    """map.png: truth, forecast and both errors of the first channel, about a day into the last forecast."""
    store = open_fields(config)
    channel = store.channels(config.data.predicted, config.data.levels)[0]
    lead = scores.day()
    with read_forecasts(forecast_path(config.run)) as forecasts:
        start = forecasts["init_time"].values[-1]
        field = forecasts[channel.variable].isel(init_time=-1, lead_time=lead)
        field = field if channel.level is None else field.sel(level=channel.level)
        predicted = field.values.reshape(-1, *store.grid.shape).mean(axis=0)
    valid = valid_times(start, scores.leads)[lead]
    times = store.indices(np.array([start, valid]))
    begin, truth = store.read([channel], times, range(store.grid.shape[0]))[:, 0]
    low, high = np.nanpercentile(truth, [0.5, 99.5])
    error = np.nanpercentile(np.abs(begin - truth), 99)
    panels = [
        (f"truth, {when(valid)}", truth, "viridis", low, high),
        (f"forecast, {scores.lead_words()[lead]}", predicted, "viridis", low, high),
        ("forecast minus truth", predicted - truth, "RdBu_r", -error, error),
        ("persistence minus truth", begin - truth, "RdBu_r", -error, error),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), layout="constrained", sharex=True, sharey=True)
    for axis, (title, values, colours, lowest, highest) in zip(axes.flat, panels, strict=True):
        image = axis.pcolormesh(
            store.grid.longitude, store.grid.latitude, values, cmap=colours, vmin=lowest, vmax=highest, rasterized=True
        )
        _draw_coasts(axis, store.grid.longitude, store.grid.latitude)
        axis.set_title(title, loc="left", fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.85)
    units = store.attributes(channel.variable).get("units", "")
    figure.suptitle(f"{channel.name} [{units}], {config.model.name}, {store.path.name}", fontsize=11)
    return _save(figure, config.run / "map.png")


def plot_forecast(config: Config, path: Path) -> Path:
    """Beside the store: the first channels of a forecast from one start, day by day, with coastlines."""
    with read_forecasts(path) as forecasts:
        ahead = lead_times(forecasts)
        days = whole_days(ahead)
        leads = (days or [0, len(ahead) - 1])[:: max(-(-len(days) // MOST_DAYS), 1)]
        names = config.data.predicted[:MOST_FIELDS]
        start = forecasts["init_time"].values[0]
        valid = valid_times(start, ahead)
        figure, axes = plt.subplots(
            len(names),
            len(leads),
            figsize=(4.6 * len(leads), 2.6 * len(names) + 0.6),
            layout="constrained",
            squeeze=False,
        )
        for row, name in zip(axes, names, strict=True):
            field, words = _first_level(forecasts[name].isel(init_time=0))
            shown = (field.mean("number") if "number" in field.dims else field).isel(lead_time=leads).load()
            low, high = np.nanpercentile(shown, [0.5, 99.5])
            for axis, lead, values in zip(row, leads, shown.values, strict=True):
                place = shown.longitude, shown.latitude
                image = axis.pcolormesh(*place, values, cmap="viridis", vmin=low, vmax=high, rasterized=True)
                _draw_coasts(axis, shown.longitude.values, shown.latitude.values)
                axis.set_title(f"{words}, {when(valid[lead])}", loc="left", fontsize=9)
            figure.colorbar(image, ax=list(row), shrink=0.85)
    figure.suptitle(f"{config.model.name}, from {when(start)}", fontsize=11)
    return _save(figure, path.with_suffix(".png"))


def plot_series(config: Config, path: Path, latitude: float, longitude: float) -> Path:
    """Beside the store: the first channels of a forecast from one start at one place, by time."""
    at = series(path, latitude, longitude)
    times = valid_times(at.init_time.values, lead_times(at))
    names = config.data.predicted[:MOST_FIELDS]
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 2.2 * len(names) + 0.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        field, words = _first_level(at[name])
        members = field.transpose("lead_time", ...).values.reshape(len(times), -1)
        axis.plot(times, members, color=COLOURS["model"], lw=1, alpha=0.4 if members.shape[1] > 1 else 1)
        axis.set_title(words, loc="left", fontsize=9)
        axis.grid(alpha=0.3)
    place = f"{float(at.latitude):g} north, {float(at.longitude):g} east"
    figure.suptitle(f"{config.model.name}, from {when(at.init_time.values)}, {place}", fontsize=11)
    return _save(figure, path.with_name(f"{path.stem}-at-{latitude:g},{longitude:g}.png"))


def _first_level(field: xr.DataArray) -> tuple[xr.DataArray, str]:
    """Of a variable that may have levels, and what to call it."""
    level = ""
    if "level" in field.dims:
        field = field.isel(level=0)
        level = f" at {float(field['level']):g}"
    return field, f"{field.name}{level} [{field.attrs.get('units', '')}]"


def _draw_coasts(axis: Any, longitude: np.ndarray, latitude: np.ndarray) -> None:
    """Natural Earth's coastlines, 1:110 million, where a field is."""
    with np.load(COASTS) as file:
        lines = file["lines"].astype(float)
    first, last = longitude.min(), longitude.max()
    for turn in (-360, 0, 360):
        east = lines[:, 0] + turn
        seen = np.where((east >= first - 1) & (east <= last + 1), east, np.nan)
        axis.plot(seen, lines[:, 1], color="black", lw=0.5, alpha=0.7)
    axis.set_xlim(first, last)
    axis.set_ylim(latitude.min(), latitude.max())


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
                    axis.plot(scores.lead_numbers(), line, color=colour, label=forecast, marker=".", ms=3)
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(alpha=0.3)
        if scores.members > 1:
            line = scores.spread[:, channel]
            axes[0, column].plot(
                scores.lead_numbers(), line, color=COLOURS["model"], ls="--", lw=1, label="model's spread"
            )
            axes[3, column].set_ylim(bottom=0)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_ylim(top=1)
        axes[2, column].axhline(0, color="black", lw=0.6)
        axes[-1, column].set_xlabel(f"lead time [{scores.lead_unit}]")
    axes[0, 0].legend(frameon=False, fontsize=9)
    paths = [path for one in config.data.stores for path in one.path]
    figure.suptitle(
        f"{config.model.name} on {', '.join(paths)}: {scores.starts} forecasts of the test period",
        fontsize=11,
    )
    return _save(figure, config.run / "scores.png")


def plot_spectra(config: Config, scores: Scores) -> Path:
    """spectra.png: power of the zonal waves of truth and forecast, at the first lead, after a day, and at the last."""
    shown = _channels(scores)
    leads = sorted({0, scores.day(), len(scores.leads) - 1})
    truth, model = FIELDS.index("truth"), FIELDS.index("model")
    size = (3.6 * len(shown) + 0.6, 4.0)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    waves = np.arange(1, scores.power.shape[-1])
    for axis, channel in zip(axes[0], shown, strict=True):
        power = scores.power[truth, leads[0], channel, 1:]
        if not np.isfinite(power).all():
            axis.set_title(f"{scores.channels[channel]} has gaps", loc="left", fontsize=10)
            continue
        axis.loglog(waves, power, color="black", lw=1.5, label="truth")
        axis.set_ylim(bottom=1e-8 * power.max())  # rounding aside
        for shade, lead in zip(np.linspace(0.4, 1, len(leads)), leads, strict=True):
            label = f"{config.model.name}, {scores.lead_words()[lead]}"
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


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
