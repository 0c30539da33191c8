"""What verbs share: a config, and changes of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from credit.boundary import leave_tracebacks_in
from credit.commands.parser import FILE, Parser, add_parser


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, examples: str
) -> Parser:
    """A verb that takes a config.

    Args:
        run: of the arguments; gives the exit code.
    """
    parser = add_parser(verbs, name, summary, examples)
    config = parser.add_argument("config", help="a YAML config, see configs/")
    config.complete = FILE  # type: ignore[attr-defined]
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the config, as in --set trainer.epochs=2; may be given again",
    )
    parser.set_defaults(verb=run)
    return parser


def add_slices(parser: argparse.ArgumentParser) -> None:
    """--slices, which is a change of the config like those of --set."""
    parser.add_argument(
        "--slices",
        dest="set",
        action="append",
        type=lambda given: f"trainer.slices={given}",
        metavar="N",
        help="latitude slices that take turns on a device the model does not fit; auto: as few as fit",
    )


def load(arguments: argparse.Namespace) -> Any:
    from credit.config import load_config

    config = load_config(arguments.config, arguments.set)
    leave_tracebacks_in(config.run)
    return config


def refuse_contradictions() -> None:
    """Before torch is imported, which takes seconds."""
    from credit.launch.ranks import choose

    choose()
