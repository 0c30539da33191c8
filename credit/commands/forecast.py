"""credit forecast: the model rolled forward."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from credit.commands.verb import add_slices, add_verb, load, refuse_contradictions
from credit.errors import ConfigError

EXAMPLES = """examples:
  torchrun --nproc-per-node 4 -m credit forecast configs/quickstart.yaml
  credit forecast my.yaml --start latest --lead 5d
  credit forecast my.yaml --start 2026-11-27T00 --from analysis.zarr --weights weights.safetensors
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "forecast", run, "forecast the test period, or from one start", EXAMPLES)
    parser.add_argument(
        "--start", metavar="TIME", help="from one time in UTC, such as 2026-11-27T00, or from the latest"
    )
    parser.add_argument("--lead", metavar="DURATION", help="how long, such as 5d, in place of forecast.lead")
    parser.add_argument(
        "--from", dest="source", action="append", metavar="STORE", help="store to start from; repeatable"
    )
    add_slices(parser)
    parser.add_argument("--at", metavar="LAT,LON", help="with --start: the series at a place too, such as 52.5,13.4")
    parser.add_argument("--weights", metavar="FILE", help="of credit export, in place of the run's checkpoint")


def run(arguments: argparse.Namespace) -> None:
    refuse_contradictions()
    from credit.evaluation.forecast import forecast
    from credit.evaluation.series import parse_place
    from credit.launch.job import start_job

    place = None if arguments.at is None else parse_place(arguments.at)
    given = {"start": arguments.start, "lead": arguments.lead, "weights": arguments.weights, "source": arguments.source}
    arguments.set += [f"forecast.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    with start_job(lambda: load(arguments)) as job:
        from_one = job.config.forecast.start is not None
        if place is not None and not from_one:
            raise ConfigError("--at is of one forecast: give --start too")
        path = forecast(job)
        if job.is_first and from_one:
            _show(job.config, path, place)


def _show(config: Any, path: Path, place: tuple[float, float] | None) -> None:
    from credit.evaluation.series import write_series

    made = [] if place is None else [write_series(path, *place)]
    try:
        from credit.evaluation.plots import plot_forecast, plot_series
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is not installed (pip install 'credit-hpc[plots]')")
    else:
        made += [plot_forecast(config, path)]
        made += [] if place is None else [plot_series(config, path, *place)]
    print(*made)
