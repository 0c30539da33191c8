"""The table scenario / expected / seen / seconds of the tests that play one, printed at the end of their run."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

LONGEST = 150


def tell(node: pytest.Item, scenario: str, expected: str, seen: str, seconds: float) -> None:
    """Add a row. `seen` is what came of it in one line, an exit code or a message."""
    node.user_properties.append(("row", (scenario, expected, " ".join(seen.split()), round(seconds))))


def lines(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The table in Markdown, of the tests that have added a row; none if there are none."""
    rows: dict[str, str] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "row":
                scenario, expected, seen, seconds = value
                said = seen if len(seen) <= LONGEST else f"{seen[:LONGEST]} ..."
                mark = "" if report.passed else "**no**: "
                rows[scenario] = f"| {scenario} | {expected} | {mark}{said} | {seconds} |"
    return ["| scenario | expected | seen | s |", "|---|---|---|---|", *rows.values()] if rows else []
