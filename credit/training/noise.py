"""What tells the members of an ensemble apart: noise that a model is given as one more input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def of_member(start: np.datetime64, member: int) -> tuple[int, int]:
    """What the noise of a forecast from a time is for."""
    return int(start.astype("datetime64[m]").astype(int)), member


@dataclass(frozen=True)
class Noise:
    """Standard normal fields that are functions of the seed and of what they are for: the same on every mesh.

    Each rank draws the whole globe and keeps its rows.

    Attributes:
        grid: (latitudes, longitudes) of the globe.
        rows: this rank's.
    """

    seed: int
    grid: tuple[int, int]
    rows: range
    device: torch.device
    dtype: torch.dtype

    def __call__(self, purposes: Sequence[tuple[int, ...]], step: int) -> Tensor:
        """(len(purposes), 1, row, longitude): of each the noise at a step from its start."""
        return torch.stack([self._field((*purpose, step)) for purpose in purposes]).to(self.device, self.dtype)

    def _field(self, purpose: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *purpose)) % 2**63)
        return torch.randn(1, *self.grid, generator=generator)[:, self.rows.start : self.rows.stop]
