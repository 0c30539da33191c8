"""Tensors of numbers that follow from shapes alone: copied to the device at their first use, not at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

from credit.domain_parallel.torch_private import is_faked, no_dispatch_modes

Made = TypeVar("Made")
KEPT = 256
"""Results of a function that are kept: those of the shapes that a model meets."""


def constants(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what `make` gives for such arguments, among them the dtype and the device. Nobody may change it in place.

    Where fake tensors stand for real ones, as while a model is recorded, it is made anew: fake like all else there.
    """

    @lru_cache(KEPT)
    def kept(*given: object) -> Made:
        # A tensor made in inference mode could not be saved for a backward later.
        with torch.inference_mode(False), no_dispatch_modes():
            return make(*given)

    @wraps(make)
    def constant(*given: object) -> Made:
        return make(*given) if is_faked() else kept(*given)

    return constant
