"""The loss as an exact global mean over uneven shards: every kind is a sum over this rank's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.config import Loss
from credit.data.grid import Grid
from credit.data.store import Channel
from credit.errors import ConfigError

NO_WAVE = 1e-6
"""Amplitude below which a wave counts as none: where there is none its phase is rounding, and so is a gradient."""


class LatitudeWeightedLoss(nn.Module):
    """Mean error over the sphere, each row weighted by its area and each channel as the config says.

    A rank computes its *share* of a sum over samples: summed over all ranks, and divided by the number of
    samples, it is the mean over samples, channels and the area of the globe.

    Args:
        options: `trainer.loss`.
        grid: of the globe.
        rows: this rank's latitudes.
        channels: of the prediction.
    """

    weights: Tensor
    channel_weights: Tensor | None

    def __init__(self, options: Loss, grid: Grid, rows: range, channels: Sequence[Channel]) -> None:
        super().__init__()
        weights = grid.latitude_weights()[rows.start : rows.stop, None]
        self.register_buffer("weights", torch.from_numpy(weights) / (grid.shape[0] * grid.shape[1]))
        self.register_buffer("channel_weights", channel_weights(options, channels))
        self._error = pointwise(options)
        self._spectral = options.spectral

    def forward(self, prediction: Tensor, target: Tensor, sample_weight: Tensor) -> Tensor:
        """(batch, channel, row, longitude) twice and (batch,) to a scalar, in the dtype of the target."""
        prediction = prediction.to(target.dtype)
        per_sample = self._over_the_globe(self._error(prediction, target))
        if self._spectral:
            apart = (zonal_amplitudes(prediction) - zonal_amplitudes(target)).square()
            # What `zonal_amplitudes` gives adds up to a mean over longitudes, not to a sum.
            of_rows = apart.sum(dim=-1, keepdim=True) * target.shape[-1]
            per_sample = per_sample + self._spectral * self._over_the_globe(of_rows)
        return (per_sample * sample_weight.to(target.dtype)).sum()

    def _over_the_globe(self, errors: Tensor) -> Tensor:
        """(batch, channel, row, longitude) to (batch,): this rank's share of the mean."""
        if self.channel_weights is not None:
            errors = errors * self.channel_weights.to(errors.dtype)
        return (errors.mean(dim=1) * self.weights.to(errors.dtype)).sum(dim=(-2, -1))


def pointwise(options: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The error of each entry, from prediction and target."""
    match options.kind:
        case "mse":
            return lambda prediction, target: (prediction - target).square()
        case "mae":
            return lambda prediction, target: (prediction - target).abs()
        case "huber":
            return lambda prediction, target: F.huber_loss(prediction, target, reduction="none", delta=options.delta)


def channel_weights(options: Loss, channels: Sequence[Channel]) -> Tensor | None:
    """Float64, (channel, 1, 1), of mean 1; None if all channels count alike.

    Raises:
        ConfigError: if none counts.
    """
    weights = torch.tensor(
        [
            options.variables.get(channel.variable, 1.0)
            * (1.0 if channel.level is None else options.levels.get(channel.level, 1.0))
            for channel in channels
        ],
        dtype=torch.float64,
    )
    if not weights.any():
        raise ConfigError("trainer.loss: the weights of variables and levels leave no channel above 0")
    return None if (weights == weights[0]).all() else (weights / weights.mean())[:, None, None]


def zonal_amplitudes(field: Tensor) -> Tensor:
    """Amplitude of every wave along each latitude: (..., longitude) to (..., longitude // 2 + 1).

    Their squares add up to the mean square over longitudes (Parseval), so the squared distance of two fields'
    amplitudes is at most their mean squared error: it is the part of it that is not a matter of phase (Subich et al.
    2025, who do so on the sphere). Each latitude by itself, and so exact on any cut of them.
    """
    waves = torch.fft.rfft(field, dim=-1, norm="forward")
    times = torch.full(waves.shape[-1:], 2.0, dtype=field.dtype, device=field.device)
    times[0] = 1
    if field.shape[-1] % 2 == 0:
        times[-1] = 1
    return ((waves.real.square() + waves.imag.square()) * times + NO_WAVE**2).sqrt()
