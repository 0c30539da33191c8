"""What a person at a terminal sees and a script or a log does not: colours and tables. No torch.

Elsewhere the same words are plain text, a line each. rich is imported at a terminal only; it honours NO_COLOR.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from credit.errors import CreditError

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "stopped": "yellow", "hint": "bold cyan"}
HEADINGS, OPTIONS = r"(?m)^[a-z][\w -]*:", r"(?<![\w-])--?[a-z][\w-]*"
"""Of help."""


def is_terminal(stream: IO[str]) -> bool:
    return stream is not None and stream.isatty()


def say_error(word: str, error: CreditError) -> None:
    """On stderr: one paragraph, as scripts and logs read it; at a terminal what is wrong and the way out apart.

    Args:
        word: "error" or "stopped".
    """
    if not is_terminal(sys.stderr):
        print(f"credit: {word}: {error}", file=sys.stderr, flush=True)
        return
    from rich.text import Text

    console = _console(sys.stderr)
    problems = getattr(error, "problems", [error])
    if len(problems) > 1:
        console.print(Text.assemble((f"{word}: ", STYLES[word]), (error.where, "bold"), f": {len(problems)} problems"))
    for one in problems:
        placed = (f"{one.where}: ", "bold") if one.where else ""
        console.print(Text.assemble((f"{word}: ", STYLES[word]), placed, one.what))
        if one.fix:
            console.print(Text.assemble(("hint: ".rjust(len(word) + 2), STYLES["hint"]), one.fix))


def print_help(text: str, stream: IO[str]) -> None:
    """Of a verb, with its headings and options marked at a terminal."""
    if not is_terminal(stream):
        with suppress(BrokenPipeError):  # of `| head`
            print(text, end="", file=stream)
        return
    from rich.text import Text

    shown = Text(text)
    shown.highlight_regex(HEADINGS, "bold green")
    shown.highlight_regex(OPTIONS, "cyan")
    _console(stream).print(shown, end="")


def print_table(plain: str, columns: Sequence[str], rows: Sequence[Sequence[str]], style: Sequence[str] = ()) -> None:
    """On stdout: the plain text; at a terminal a table, whose columns of numbers are to the right.

    Args:
        plain: the same for scripts and logs.
        style: of each row, by name of `STYLES`, for its first cell; none if empty.
    """
    if not is_terminal(sys.stdout):
        print(plain)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        is_number = all(_is_number(row[number]) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for number, row in enumerate(rows):
        first = Text(row[0], STYLES[style[number]] if style else "")
        table.add_row(first, *map(Text, row[1:]))
    console = _console(sys.stdout)
    if not style and console.measure(table).maximum > console.width:  # numbers are not broken in two
        print(plain)
        return
    console.print(table)


def _is_number(cell: str) -> bool:
    try:
        float(cell.split(" ")[0])
    except ValueError:
        return False
    return True


def _console(stream: IO[str]) -> Any:
    """Lines of text are left for the terminal to wrap: they can be copied whole."""
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True, emoji=False, markup=False)
