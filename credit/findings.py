"""What a check found: how bad, where, what, and the way out. Printed as lines, or as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


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

    def __str__(self) -> str:
        return f"{self.severity:8s} {self.where}: {self.message}" + (f". {self.fix}" if self.fix else "")


def report(findings: Sequence[Finding], as_json: bool) -> tuple[str, int]:
    """(text, exit code: 1 if any is an error)."""
    code = int(any(one.severity == "error" for one in findings))
    if as_json:
        return json.dumps([asdict(one) for one in findings], indent=2), code
    return "\n".join(map(str, findings)), code
