"""Validation losses of a run, beside its checkpoints: which is the best, and whether it still gets better."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from credit.errors import CheckpointError
from credit.files import write_atomically

FILE = "validated.json"


def write_losses(directory: Path, losses: dict[int, float]) -> None:
    """Losses by step, with a digest: a changed byte must not choose another checkpoint."""
    text = json.dumps({str(step): loss for step, loss in sorted(losses.items())})
    write_atomically(directory / FILE, json.dumps({"losses": text, "digest": _digest(text)}) + "\n")


def read_losses(directory: Path) -> dict[int, float]:
    """What `write_losses` wrote; nothing before the first validation.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        found = json.loads((directory / FILE).read_text())
        if found["digest"] != _digest(found["losses"]):
            raise ValueError("its digest is of something else")
        return {int(step): float(loss) for step, loss in json.loads(found["losses"]).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / FILE} is damaged ({error}): remove it, and the validation losses so far are forgotten"
        ) from None


def best_step(losses: dict[int, float]) -> int | None:
    """The first step of the least loss that is a number; None if there is none."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], step)) if finite else None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
