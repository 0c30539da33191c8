"""What a check found: how bad, where, what, and the way out. Printed as lines, or as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from credit.boundary import explained


@dataclass(frozen=True)
class Finding:
    """Attributes:
    severity: "error" means that a job would stop, or be wrong.
    where: dotted path of the config, or the part of the machine.
    fix: what to do; empty where all is well.
    """

    severity: Literal["ok", "warning", "error"]
    where: str
    message: str
    fix: str = ""

    @classmethod
    def of(cls, error: BaseException, where: str) -> Finding:
        """What an error says; it knows better than `where` what it is about, if it says so."""
        ours = explained(error)
        return cls("error", ours.where or where, ours.what, ours.fix)

    def __str__(self) -> str:
        return f"{self.severity:8s} {self.where}: {self.message}" + (f". {self.fix}" if self.fix else "")


def report(findings: Sequence[Finding], as_json: bool) -> tuple[str, int]:
    """(text, exit code: 1 if any is an error)."""
    code = int(any(one.severity == "error" for one in findings))
    if as_json:
        return json.dumps([asdict(one) for one in findings], indent=2), code
    return "\n".join(map(str, findings)), code
