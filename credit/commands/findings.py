"""How verbs show what a check found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from credit.terminal import print_table

if TYPE_CHECKING:
    from credit.findings import Finding


def show(findings: Sequence[Finding], as_json: bool) -> int:
    """Print them; the exit code is 1 if any is an error."""
    from credit.findings import report

    text, code = report(findings, as_json)
    if as_json:
        print(text)
        return code
    rows = [[one.severity, one.where, one.message + (f"\n{one.fix}" if one.fix else "")] for one in findings]
    print_table(text, ("", "where", "what"), rows, [one.severity for one in findings])
    return code
