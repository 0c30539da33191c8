"""The parser of the command line: argparse, which knows the nearest verb and option, and says errors as all others."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from credit.boundary import bounded
from credit.errors import CreditError
from credit.terminal import print_help

FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""What completes an argument that is a file, as shtab has it: `add_argument(...).complete = FILE`."""


class Parser(argparse.ArgumentParser):
    """Attributes:
    verbs: its sub-parsers by name; empty if it has none.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **keys)
        self.verbs: dict[str, Parser] = {}

    def add_verbs(self) -> Any:
        action = self.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=Parser)
        self.verbs = action.choices
        return action

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        print_help(self.format_help(), file or sys.stdout)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but each parser says itself what it does not know."""
        first = next(iter(args or ()), "-")
        if self.verbs and not first.startswith("-") and first not in self.verbs:
            self._refuse(f"there is no verb {first!r}", self._nearest_verb(first))
        given, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(f"{' '.join(unknown)}: not understood", self._nearest_option(unknown[0]))
        return given, unknown

    def error(self, message: str) -> NoReturn:
        self._refuse(message, f"`{self.prog} --help` shows how")

    def _refuse(self, what: str, fix: str) -> NoReturn:
        """On one rank of those that a launcher has started, and exit code 2."""

        def raising() -> NoReturn:
            raise CreditError(what, fix=fix)

        sys.exit(bounded(raising))

    def _nearest_verb(self, word: str) -> str:
        deeper = {name: f"{verb} {name}" for verb, parser in self.verbs.items() for name in parser.verbs}
        known = {**deeper, **{verb: verb for verb in self.verbs}}
        return _nearest(word, known, self.prog) or f"verbs: {', '.join(self.verbs)}"

    def _nearest_option(self, word: str) -> str:
        known = {option: option for option in re.findall(r"--[a-z][\w-]*", self.format_help())}
        if "=" in word and not word.startswith("-") and "--set" in known:
            return f"a key of the config is replaced by --set {word}"
        return _nearest(word.partition("=")[0], known) or f"`{self.prog} --help` lists the options"


def add_parser(verbs: Any, name: str, summary: str, examples: str) -> Parser:
    """A verb.

    Args:
        verbs: of `Parser.add_verbs`.
        summary: what it does.
        examples: command lines, one a line, under "examples:".
    """
    return verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=examples)


def _nearest(word: str, known: dict[str, str], prefix: str = "") -> str:
    """A question, or nothing: which of the known is meant, by what is to be written."""
    near: Sequence[str] = difflib.get_close_matches(word, known, 2)
    meant = (f"`{f'{prefix} {known[one]}'.strip()}`" for one in near)
    return f"did you mean {' or '.join(meant)}?" if near else ""
