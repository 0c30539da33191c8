"""credit doctor: is this place fit?"""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.parser import add_parser

EXAMPLES = """examples:
  credit doctor
  srun -N 2 --ntasks-per-node 4 python -m credit doctor
  apptainer exec credit.sif credit doctor --json
"""


def add(verbs: Any) -> None:
    summary = "look whether this machine, environment or container is fit; exit code 1 if it is not"
    parser = add_parser(verbs, "doctor", summary, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from credit.commands.findings import show
    from credit.launch.doctor import examine

    return show(examine(), arguments.json)
