"""A run on one page: an HTML file that holds its pictures and loads nothing, from what the run directory holds."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
import yaml

from credit import __version__
from credit.config import Config
from credit.errors import DataError
from credit.evaluation.score import nearest_to_a_day, shown
from credit.files import write_atomically
from credit.status import read_status
from credit.steps import in_words
from credit.training.log import read_log

TEMPLATE = Path(__file__).with_name("report.html")
PICTURES = {
    "training.png": "Loss of training and validation, norm of the gradient, and learning rate, by step",
    "scores.png": "Scores by lead time",
    "map.png": "A forecast beside the truth",
    "spectra.png": "Power of zonal waves, truth and forecast",
}
"""Where they are in the page is the template's."""
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Lead:
    """Of one channel and lead time, in the channel's units.

    Attributes:
        skill: 1 - RMSE of the model / RMSE of persistence: 1 is perfect, 0 is no better than no change.
    """

    words: str
    rmse: dict[str, float]
    acc: float
    bias: float

    @property
    def skill(self) -> float:
        return 1 - self.rmse["model"] / self.rmse["persistence"] if self.rmse["persistence"] else float("nan")


@dataclass(frozen=True)
class Channel:
    """Scores of one channel, every day (or year, of months) and at the first and last lead.

    Attributes:
        day: the lead nearest to a day, or to a month.
    """

    name: str
    units: str
    leads: list[Lead]
    day: Lead


def write_report(config: Config, path: Path, traffic: Rows | None = None) -> Path:
    """Write the page.

    Args:
        path: of the file; what is there is replaced.
        traffic: (name, value) of what a rank sends in a step, and needs.

    Raises:
        DataError: if no training of this config has begun, or a file of the run is damaged.
        CreditError: if the page cannot be written.
    """
    run = config.run
    state, _ = read_status(run)
    steps, valid = read_log(run)
    try:
        channels = _channels(run / "scores.csv")
    except (ValueError, KeyError, csv.Error) as error:
        raise DataError(f"is damaged: {error}", str(run / "scores.csv"), "`credit score` writes it anew") from None
    pictures = {name: _embedded(run / name) for name in PICTURES if (run / name).exists()}
    forecasts = {one.stem: _embedded(one) for one in sorted(run.glob("forecast-*.png"))}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    html = page.render(
        title=run.name,
        config=config,
        step=in_words(config.data.step),
        state=state.removeprefix(f"{run}: "),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        text=yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True),
        figures=_figures(steps, valid, channels),
        channels=channels,
        words=PICTURES,
        pictures=pictures,
        forecasts=forecasts,
        timings=_timings(config, steps),
        traffic=traffic or [],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html)
    return path


def _channels(path: Path) -> list[Channel]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = []
    for (name, units), of_channel in groupby(rows, key=lambda row: (row["channel"], row["units"])):
        each = [*of_channel]
        head = next(one for one in each[0] if one.startswith("lead_"))
        unit, minutes = ("M", 1) if head == "lead_months" else ("m", 60)
        counts = [*dict.fromkeys(row[head] for row in each)]
        times = np.array([round(float(count) * minutes) for count in counts]).astype(f"timedelta64[{unit}]")
        leads = [
            _lead(in_words(time), [row for row in each if row[head] == count])
            for time, count in zip(times, counts, strict=True)
        ]
        day = leads[nearest_to_a_day(times)]
        found.append(Channel(name, units, [leads[place] for place in shown(times)], day))
    return found


def _lead(words: str, rows: list[dict[str, str]]) -> Lead:
    """Of the rows of one channel and lead, one a forecast."""
    scores = {row["forecast"]: row for row in rows}
    rmse = {forecast: float(row["rmse"]) for forecast, row in scores.items()}
    return Lead(words, rmse, float(scores["model"]["acc"]), float(scores["model"]["bias"]))


def _figures(steps: dict[str, np.ndarray], valid: dict[str, np.ndarray], channels: Sequence[Channel]) -> Rows:
    """The few numbers that say how it went."""
    figures: Rows = []
    if valid and len(valid["loss"]):
        best = int(np.argmin(valid["loss"]))
        figures.append((f"{valid['loss'][best]:.4f}", f"least validation loss, epoch {valid['epoch'][best]:.0f}"))
    if steps and len(steps["loss"]):
        figures.append((f"{steps['loss'][-1]:.4f}", f"loss of the last step, {steps['step'][-1]:,.0f}"))
    for channel in channels[:1]:
        day = channel.day
        figures.append((f"{day.skill:+.0%}", f"skill over persistence of {channel.name} at {day.words}"))
        figures.append((f"{day.acc:.3f}", f"ACC of {channel.name} at {day.words}"))
    return figures


def _timings(config: Config, steps: dict[str, np.ndarray]) -> Rows:
    """Of the steps in log.csv, the first left out: it builds and compiles."""
    seconds, waited = (steps.get(name, np.zeros(0)) for name in ("seconds", "waited"))
    if len(seconds) < 2:
        return []
    whole = seconds[1:] + waited[1:]
    total = float((seconds + waited).sum())
    return [
        ("steps", f"{len(seconds):,}"),
        ("a step, median", f"{np.median(seconds[1:]):.3f} s"),
        ("a step, of ten one is slower than", f"{np.quantile(seconds[1:], 0.9):.3f} s"),
        ("the first step", f"{seconds[0]:.3f} s"),
        ("waiting for data", f"{waited[1:].sum() / whole.sum():.1%}"),
        ("samples a second, median", f"{config.trainer.batch_size / np.median(whole):.1f}"),
        ("in all", f"{int(total) // 3600} h {int(total) // 60 % 60} min {int(total) % 60} s"),
    ]


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
