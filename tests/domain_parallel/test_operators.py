"""Every operator at every height: sharded == plain in float64, output, input gradient and every parameter gradient."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch

from tests.domain_parallel import parity
from tests.domain_parallel.operators import OPERATORS, C, W

TOLERANCE = 1e-9
HEIGHTS = (5, 12, 16, 17)


def plain_runs(name: str, height: int) -> bool:
    """False where torch itself refuses (a reflection wider than the field, windows that do not divide)."""
    try:
        y = copy.deepcopy(OPERATORS[name]()).double()(torch.randn(2, C, height, W, dtype=torch.float64))
        return y.numel() > 0
    except (RuntimeError, ValueError):
        return False


def worst_errors(height: int, names: list[str]) -> dict[str, str]:
    """For each operator that is not exact, or stops: what happened."""
    found = {}
    for name in names:
        if not plain_runs(name, height):
            continue
        try:
            torch.manual_seed(1)
            errors = parity.errors(OPERATORS[name](), (2, C, height, W))
            wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
            if wrong:
                found[name] = str(wrong)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operator_is_exact(worlds, size: int, height: int) -> None:
    found = worlds(size).run(worst_errors, height, list(OPERATORS))
    wrong = {name: text for rank in found for name, text in rank.items()}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
