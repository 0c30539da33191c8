"""What numbers of users may be, in configs, options and the environment: what is beyond is a slip. Light to import."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

MOST = 1_000_000
"""Ranks, epochs, samples of a batch, steps of a rollout, rows of a grid."""
MOST_STEPS = 1_000_000_000
"""Steps of the optimiser."""
MOST_LAYERS, MOST_CHANNELS = 1_000, 100_000
"""Of a model."""
MOST_PROCESSES = 1_000
"""That a rank starts, and batches that are read ahead."""
MOST_HOURS, MOST_MONTHS = 1_000_000, 1_200
"""A century."""
LARGEST = 1e6
"""Rates, weights, seconds, gigabytes."""
LARGEST_VALUE = 1e30
"""Of a field, in any unit: float32 ends at 3.4e38."""
FIRST_YEAR, LAST_YEAR = 1678, 2261
"""Times are nanoseconds since 1970 in 64 bits."""


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """The type of an option: a whole number between two."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


def file(text: str) -> Path:
    """The type of an option: the name of a file or directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    return Path(text)


def positive(text: str) -> float:
    """The type of an option: a number above 0."""
    try:
        number = float(text) if text.isascii() and "_" not in text else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, up to {LARGEST:g}")
    return number
