"""credit verify: is a model's directory what was certified, and is it exact here?"""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file
from credit.commands.parser import FILE, add_parser

EXAMPLES = """examples:
  credit export my.yaml model/
  credit verify model/
  credit verify model/ --files-only --json

Exit code 1 if a file was changed, or the model over ranks is not the plain one here.
"""


def add(verbs: Any) -> None:
    summary = "look whether a directory of credit export is as certified, and its model exact here"
    parser = add_parser(verbs, "verify", summary, EXAMPLES)
    directory = parser.add_argument("directory", type=file, metavar="DIR", help="that credit export wrote")
    directory.complete = FILE  # type: ignore[attr-defined]
    parser.add_argument("--files-only", action="store_true", help="do not run the model")
    parser.add_argument("--trust", action="store_true", help="import the classes of others that it names")
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    from credit.checks.certificate import verify
    from credit.findings import report

    found = [*verify(arguments.directory, arguments.files_only, arguments.trust)]
    text, code = report(found, arguments.json)
    print(text)
    return code
