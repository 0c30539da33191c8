"""How far a run is: one small file in the run directory, read by `credit status` and by job scripts. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from credit.errors import Stopped

FILE = "status.json"


def write_status(run: Path, state: str, step: int, steps: int) -> None:
    """`state` is "running", "stopped" (saved, to be gone on with) or "finished"."""
    partial = run / f".{FILE}.partial"
    partial.write_text(json.dumps({"state": state, "step": step, "steps": steps}) + "\n")
    os.replace(partial, run / FILE)


def read_status(run: Path) -> tuple[str, int]:
    """(a line for people, exit code: 0 finished, 75 stopped by a signal, 1 anything else)."""
    try:
        status = json.loads((run / FILE).read_text())
    except FileNotFoundError:
        return f"{run}: no training has begun", 1
    line = f"{run}: {status['state']}, step {status['step']} of {status['steps']}"
    if status["state"] == "running":
        line += " when it began; it runs, or was ended without a signal"
    return line, {"finished": 0, "stopped": Stopped.exit_code}.get(status["state"], 1)
