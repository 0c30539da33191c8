"""credit report: a run on one page."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file
from credit.commands.parser import FILE
from credit.commands.verb import add_verb, load
from credit.errors import CreditError

EXAMPLES = """examples:
  credit report configs/quickstart.yaml
  credit report my.yaml --to for_my_colleagues.html
"""


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs, "report", run, "write a run as one HTML file: config, curves, scores, maps, timings, traffic", EXAMPLES
    )
    path = parser.add_argument(
        "--to", type=file, default=None, metavar="FILE", help="the file to write (default: report.html beside the run)"
    )
    path.complete = FILE  # type: ignore[attr-defined]


def run(arguments: argparse.Namespace) -> None:
    from credit.checks.plan import traffic
    from credit.evaluation.report import write_report
    from credit.status import read_mesh

    config = load(arguments)
    if arguments.to is not None and arguments.to.is_dir():
        raise CreditError("is a directory", str(arguments.to), "name a file, such as report.html in it")
    mesh = read_mesh(config.run)
    rows = [] if mesh is None else traffic(config, mesh)
    try:
        from credit.evaluation.plots import plot_training
    except ModuleNotFoundError as error:
        print(f"no curves: {error.name} is not installed (pip install 'credit-hpc[plots]')")
    else:
        plot_training(config)
    print(write_report(config, arguments.to or config.run / "report.html", rows))
