"""The latitude-weighted loss as an exact global mean over uneven shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from credit.data.grid import Grid


class LatitudeWeightedMSE(nn.Module):
    """Mean squared error over the sphere, each row weighted by its area.

    A rank computes its *share* of a sum over samples: summed over all ranks, and divided by the number of
    samples, it is the mean over samples, channels and the area of the globe.

    Args:
        grid: of the globe.
        rows: this rank's latitudes.
    """

    weights: Tensor

    def __init__(self, grid: Grid, rows: range) -> None:
        super().__init__()
        weights = grid.latitude_weights()[rows.start : rows.stop, None]
        self.register_buffer("weights", torch.from_numpy(weights) / (grid.shape[0] * grid.shape[1]))

    def forward(self, prediction: Tensor, target: Tensor, sample_weight: Tensor) -> Tensor:
        """(batch, channel, row, longitude) twice and (batch,) to a scalar, in the dtype of the target."""
        squares = (prediction.to(target.dtype) - target).square().mean(dim=1)
        per_sample = (squares * self.weights.to(target.dtype)).sum(dim=(-2, -1))
        return (per_sample * sample_weight.to(target.dtype)).sum()
