"""What `credit data describe` prints: what is in some stores, and the `data` block that fits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import yaml

from credit.data.opening import expand
from credit.data.piece import Piece, piece_of
from credit.data.times import when
from credit.errors import DataError
from credit.steps import of_months, to_text

HOUR = np.timedelta64(1, "h")
PARTS = (0.8, 0.9)
"""Where training ends and validation, as parts of all times."""


def describe(paths: Sequence[str]) -> str:
    """A few lines of each store, and a block to paste into a config.

    Raises:
        DataError: if none can be opened; one that cannot, beside others, is said and left out.
    """
    found, lines = [], []
    for path in expand(paths):
        try:
            piece = piece_of(path)
            problems = {name: _problem(piece, name, dims) for name, dims in piece.variables.items()}
            lines += _lines(piece, problems)
        except DataError as error:
            lines.append(f"not usable: {error}")
            continue
        found.append((piece, [name for name, problem in problems.items() if not problem]))
    if not found:
        raise DataError("; ".join(lines))
    return "\n".join([*lines, "", *_block(paths, found)])


def _lines(piece: Piece, problems: dict[str, str]) -> list[str]:
    lines = [f"{piece.path}: {piece.grid.shape[0]} x {piece.grid.shape[1]}, {piece.grid}"]
    if piece.times is not None and len(piece.times):
        steps = np.diff(piece.times)
        every = f" every {_text(steps.min())}" if len(steps) else ""
        odd = int((steps != steps.min()).sum()) if len(steps) else 0
        gaps = f", {odd} times further apart" if odd else ""
        lines.append(f"  {len(piece.times)} times, {when(piece.times[0])} to {when(piece.times[-1])}{every}{gaps}")
    lines += [f"  {note}" for note in piece.notes]
    for name, dims in piece.variables.items():
        attributes = piece.attributes(name)
        words = attributes.get("long_name") or attributes.get("standard_name") or ""
        where = f"{len(piece.levels(name))} levels" if "level" in dims else "surface" if "time" in dims else "no time"
        lines.append(f"  {name:<28} {where:<12} {attributes.get('units', ''):<14} {words}{problems[name]}".rstrip())
    return lines


def _problem(piece: Piece, name: str, dims: tuple[str, ...]) -> str:
    if "latitude" not in dims or "longitude" not in dims:
        return " (not a field)"
    try:
        piece.read(name, [float(piece.levels(name)[0])] if "level" in dims else [None], [0], range(piece.grid.shape[0]))
    except DataError as error:
        return f" ({str(error).removeprefix(f'{piece.path}: ')})"
    return ""


def _block(paths: Sequence[str], found: list[tuple[Piece, list[str]]]) -> list[str]:
    """The `data` of a config with all fields that can be read, of each store these."""
    usable = {name: (piece, piece.variables[name]) for piece, names in reversed(found) for name in names}
    moving = [name for name, (_, dims) in usable.items() if "time" in dims]
    if not moving:
        return ["no field changes in time: there is nothing to predict"]
    each = [piece.levels(name).astype(float) for name, (piece, dims) in usable.items() if "level" in dims]
    levels = functools.reduce(np.intersect1d, each).tolist() if each else []
    times = np.unique(np.concatenate([piece.times for piece, _ in usable.values() if piece.times is not None]))
    steps = np.diff(times)
    step = steps.min() if len(steps) else HOUR
    bounds = [times[0], *(times[round(part * (len(times) - 1))] for part in PARTS), times[-1] + step]
    block = {
        "path": list(paths) if len(paths) > 1 else paths[0],
        "variables": moving,
        **({"levels": [int(one) if one.is_integer() else one for one in levels]} if levels else {}),
        "statics": [*(name for name in usable if name not in moving), "sin_latitude", "cos_latitude"],
        "forcings": ["cos_zenith"],
        **({"grid": "region"} if any(piece.grid.region for piece, _ in found) else {}),
        "step": _text(step),
        **{
            period: [when(begin), when(end)]
            for period, begin, end in zip(("train", "valid", "test"), bounds[:-1], bounds[1:], strict=True)
        },
        **({"gaps": "skip"} if len(steps) and (steps != step).any() else {}),
    }
    return yaml.safe_dump({"data": block}, sort_keys=False, default_flow_style=None, width=100).splitlines()


def _text(step: np.timedelta64) -> str:
    """As a config has it; seconds, which none can have, as what they are."""
    seconds = step.astype("timedelta64[s]").astype(int) if not of_months(step) else 0
    return f"{seconds}s" if seconds % 60 else to_text(step)
