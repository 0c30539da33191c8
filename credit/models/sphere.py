"""Padding a latitude-longitude grid on the sphere, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_on_sphere(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pad (..., latitude, longitude): around the globe in longitude, across the poles in latitude.

    The k-th row beyond a pole is the k-th row from it, seen from the other side: shifted by half the longitudes.
    For grids without points on the poles; with them, the pole row itself comes first.

    Raises:
        ValueError: if the longitudes are odd in number, so that no point lies opposite.
    """
    if rows:
        if x.shape[-1] % 2:
            raise ValueError(f"{x.shape[-1]} longitudes: no point lies opposite another across the pole")
        half = x.shape[-1] // 2
        north = x[..., :rows, :].flip(-2).roll(half, -1)
        south = x[..., -rows:, :].flip(-2).roll(half, -1)
        x = torch.cat([north, x, south], -2)
    return F.pad(x, (columns, columns, 0, 0), mode="circular") if columns else x
