"""The table scenario / expected / seen / seconds of the tests that play one, printed at the end of their run."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

LONGEST = 150
HEAD = ("| scenario | expected | seen | s |", "|---|---|---|---|")


def row(scenario: str, expected: str, seen: str, seconds: float, fits: bool) -> str:
    """A line in Markdown; what does not fit is marked."""
    said = " ".join(seen.split())
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    return f"| {scenario} | {expected} | {'' if fits else '**no**: '}{said} | {seconds:.0f} |"


def tell(node: pytest.Item, scenario: str, expected: str, seen: str, seconds: float) -> None:
    """Add a row. `seen` is what came of it in one line, an exit code or a message."""
    node.user_properties.append(("row", (scenario, expected, seen, seconds)))


def lines(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The table in Markdown, of the tests that have added a row; none if there are none."""
    rows: dict[str, str] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "row":
                rows[value[0]] = row(*value, fits=report.passed)
    return [*HEAD, *rows.values()] if rows else []
