"""credit migrate: another package's config as one of ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from credit.bounds import file, whole
from credit.commands.findings import show
from credit.commands.parser import FILE, add_parser

EXAMPLES = """examples:
  credit migrate theirs.yml                            what becomes of each key
  credit migrate theirs.yml mine.yaml --ranks 32       and our config; theirs ran on 32 GPUs

Exit code 1 if something remains to be written: lines that begin with error.
"""


def add(verbs: Any) -> None:
    summary = "turn a config of NCAR's CREDIT into one of ours, and say what has no counterpart"
    parser = add_parser(verbs, "migrate", summary, EXAMPLES)
    theirs = parser.add_argument("theirs", type=file, metavar="THEIRS", help="their YAML file")
    theirs.complete = FILE  # type: ignore[attr-defined]
    parser.add_argument("path", type=file, nargs="?", metavar="OURS", help="the file to write; it must not be there")
    parser.add_argument("--ranks", type=whole(), default=None, help="GPUs that theirs ran on, if it does not say")
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    import yaml

    from credit.config.migrate import migrate
    from credit.errors import ConfigError
    from credit.files import write_atomically
    from credit.reading import read_yaml

    theirs = read_yaml(arguments.theirs)
    if not isinstance(theirs, dict):
        raise ConfigError("holds no blocks of keys", str(arguments.theirs))
    ours, findings = migrate(theirs, arguments.ranks)
    if arguments.path is not None:
        path = Path(arguments.path)
        if path.exists():
            raise ConfigError("is there already, and nothing was written", str(path))
        head = f"# From {arguments.theirs.name}, by credit migrate.\n\n"
        write_atomically(path, head + yaml.safe_dump(ours, sort_keys=False))
    return show(findings, arguments.json)
