"""Padding a latitude-longitude grid on the sphere, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = int | tuple[int, int]
"""As many on both sides, or (before, after)."""


def pad_on_sphere(x: Tensor, rows: Sides, columns: Sides) -> Tensor:
    """Pad (..., latitude, longitude): around the globe in longitude, across the poles in latitude.

    The k-th row beyond a pole is the k-th row from it, seen from the other side: shifted by half the longitudes.
    For grids without points on the poles; with them, the pole row itself comes first.

    Raises:
        ValueError: if the longitudes are odd in number, so that no point lies opposite.
    """
    (first, last), (west, east) = ((n, n) if isinstance(n, int) else n for n in (rows, columns))
    if first or last:
        if x.shape[-1] % 2:
            raise ValueError(f"{x.shape[-1]} longitudes: no point lies opposite another across the pole")
        half = x.shape[-1] // 2
        before = x[..., :first, :].flip(-2).roll(half, -1)
        after = x[..., x.shape[-2] - last :, :].flip(-2).roll(half, -1)
        x = torch.cat([before, x, after], -2)
    return F.pad(x, (west, east, 0, 0), mode="circular") if west or east else x
