"""credit status: how far a run is."""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.verb import add_verb, load

EXAMPLES = """examples:
  credit status my.yaml
  credit status my.yaml --set run=runs/five
"""


def add(verbs: Any) -> None:
    summary = "say how far the run is; exit code 0 if finished, 75 if stopped by a signal, 1 otherwise"
    add_verb(verbs, "status", run, summary, EXAMPLES)


def run(arguments: argparse.Namespace) -> int:
    from credit.status import read_status

    line, code = read_status(load(arguments).run)
    print(line)
    return code
