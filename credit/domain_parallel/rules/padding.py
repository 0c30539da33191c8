"""Padding: rows past the edge of the cut axis are fill, or rows of the field from wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from credit.domain_parallel.partition import Window
from credit.domain_parallel.reshard import select
from credit.domain_parallel.slab import Declined, Slab, rule

MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@rule("F.pad", "nn.pad")
def pad_(input: Slab, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    pads = list(pad)
    if len(pads) % 2 or len(pads) > 2 * input.ndim or mode not in MODES:
        raise Declined
    if mode == "circular" and min(pads) < 0:
        raise Declined  # torch then goes round what is left
    place = 2 * (input.ndim - 1 - input.cut)
    if place >= len(pads):
        return input.like(F.pad(input.local, pads, mode, value))
    before, after = pads[place : place + 2]
    local = input.local
    if any(pads[:place]) or any(pads[place + 2 :]):
        pads[place : place + 2] = [0, 0]
        local = F.pad(local, pads, mode, value)
    if not (before or after):
        return input.like(local)
    # Negative: rows are taken away.
    return select(input.like(local), Window(1, 1, 1, before, after, MODES[mode]), value or 0.0)


@rule("constant_pad_nd")
def constant_pad_nd(input: Slab, pad: Sequence[int], value: float = 0) -> Any:
    return pad_(input, pad, "constant", value)
