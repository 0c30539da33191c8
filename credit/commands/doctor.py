"""credit doctor: is this place fit?"""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    parser = verbs.add_parser("doctor", help="is this machine, environment or container fit? exit code 1 if not")
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from credit.findings import report
    from credit.launch.doctor import examine

    text, code = report(examine(), arguments.json)
    print(text)
    return code
