"""The loss as an exact global mean over uneven shards: every kind is a sum over this rank's rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.config import Loss
from credit.data.grid import Grid
from credit.data.store import Channel
from credit.dotted import call_dotted, load_dotted
from credit.errors import ConfigError, DataError

NO_WAVE = 1e-6
"""Amplitude below which a wave counts as none: where there is none its phase is rounding, and so is a gradient."""


class LatitudeWeightedLoss(nn.Module):
    """Mean error over the area of the grid, and over channels as the config weights them.

    A rank computes its *share* of a sum over samples: summed over all ranks, and divided by the number of
    samples, it is the mean over samples, channels and area.

    Args:
        options: `trainer.loss`.
        grid: of the whole field.
        rows: this rank's latitudes.
        channels: of the prediction.
        mask: false where values are missing, of the globe: (channel, latitude, longitude). The mean of a channel is
            then over the area where there are some.
        boundary: rows and columns along the edges of a region that do not count.
    """

    weights: Tensor
    channel_weights: Tensor | None
    mask_weights: Tensor | None

    def __init__(
        self,
        options: Loss,
        grid: Grid,
        rows: range,
        channels: Sequence[Channel],
        mask: np.ndarray | None = None,
        boundary: int = 0,
    ) -> None:
        super().__init__()
        areas = grid.cell_weights(boundary)
        self.register_buffer("weights", torch.from_numpy(areas[rows.start : rows.stop].copy()))
        self.register_buffer("channel_weights", channel_weights(options, channels))
        self.register_buffer("mask_weights", None if mask is None else mask_weights(mask, areas, rows, channels))
        self.error = pointwise(options, len(channels), grid.shape[1])
        self._spectral, self._members = options.spectral, options.ensemble

    def forward(self, prediction: Tensor, target: Tensor, sample_weight: Tensor) -> Tensor:
        """To a scalar, in the dtype of the target.

        Args:
            prediction: (batch x members, channel, row, longitude), members of a sample side by side.
            target: (batch, channel, row, longitude).
            sample_weight: (batch,).
        """
        prediction = prediction.to(target.dtype).unflatten(0, (len(target), self._members))
        per_sample = self._over_the_globe(self.error(prediction, target))
        if self._spectral:
            apart = (zonal_amplitudes(prediction) - zonal_amplitudes(target)[:, None]).square().mean(dim=1)
            # What `zonal_amplitudes` gives adds up to a mean over longitudes, not to a sum.
            of_rows = apart.sum(dim=-1, keepdim=True) * target.shape[-1]
            per_sample = per_sample + self._spectral * self._over_the_globe(of_rows)
        return (per_sample * sample_weight.to(target.dtype)).sum()

    def _over_the_globe(self, errors: Tensor) -> Tensor:
        """(batch, channel, row, longitude) to (batch,): this rank's share of the mean."""
        if self.channel_weights is not None:
            errors = errors * self.channel_weights.to(errors.dtype)
        if self.mask_weights is not None:
            errors = errors * self.mask_weights.to(errors.dtype)
        return (errors.mean(dim=1) * self.weights.to(errors.dtype)).sum(dim=(-2, -1))


FAIRNESS = 0.95
"""Of the score that is minimised: the fair one does not move a member while all others are at the truth, nor, of two
members, either while the truth lies between them (Lang et al. 2024, arXiv:2412.15832, whose value this is)."""


def pointwise(options: Loss, channels: int, longitudes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The error of each entry, from prediction (batch, member, ...) and target (batch, ...).

    Args:
        channels, longitudes: of the fields, which a loss of a user's own may know of.
    """
    match options.kind:
        case "mse":
            return lambda prediction, target: (prediction[:, 0] - target).square()
        case "mae":
            return lambda prediction, target: (prediction[:, 0] - target).abs()
        case "crps":
            return partial(crps, fairness=FAIRNESS)
        case "huber":
            return lambda prediction, target: F.huber_loss(
                prediction[:, 0], target, reduction="none", delta=options.delta
            )
        case _:
            return _Own(options, channels, longitudes)


class _Own(nn.Module):
    """A user's error of each entry.

    Raises:
        ConfigError: if that is not what it gives: its means would not be those of the globe on any cut.
    """

    def __init__(self, options: Loss, channels: int, longitudes: int) -> None:
        super().__init__()
        where = "trainer.loss.kind"
        self._call = load_dotted(options.kind, where)
        if inspect.isclass(self._call):
            self._call = call_dotted(options.kind, where, **options.arguments)
        else:
            self._call = partial(self._call, **options.arguments)
        generator = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(2, 2, channels, 6, longitudes, generator=generator, dtype=torch.float64)
        rows, sample = (slice(None), slice(None), slice(1, 3)), (slice(0, 1),)
        try:
            whole = self._call(prediction, target)
            alike = [
                torch.allclose(whole[part], self._call(prediction[part], target[part]), rtol=1e-12)
                for part in (rows, sample)
                if whole.shape == target.shape
            ]
        except Exception as wrong:
            raise ConfigError(
                f"{where}: {options.kind}, called with (prediction, target) of {tuple(target.shape)}: {wrong}"
            ) from wrong
        if alike != [True, True]:
            raise ConfigError(
                f"{where}: {options.kind} must give the error of each entry by itself, in the shape of the target "
                f"(of torch's losses with arguments: {{reduction: none}}); its mean over the globe is taken here"
            )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self._call(prediction[:, 0], target)


def crps(members: Tensor, truth: Tensor, fairness: float = 1.0) -> Tensor:
    """Continuous ranked probability score of (batch, member, ...) and (batch, ...), (batch, ...): the less the better.

    The mean distance to the truth, less half the mean distance of two members: with fairness 1 of two different ones,
    which estimates the score of the distribution that the members are drawn from, whatever their number (Ferro 2014,
    doi:10.1002/qj.2270), with fairness 0 of any two. Of one member it is the absolute error.
    """
    count = members.shape[1]
    score = (members - truth[:, None]).abs().mean(dim=1)
    for turn in range(1, count):  # each meets each other one
        apart = (members - members.roll(turn, 1)).abs().sum(dim=1)
        score = score - (1 - (1 - fairness) / count) * apart / (2 * count * (count - 1))
    return score


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


def mask_weights(mask: np.ndarray, areas: np.ndarray, rows: range, channels: Sequence[Channel]) -> Tensor:
    """1 over the part of the area where values are, 0 where none are: float64, (channel, row, longitude).

    Args:
        areas: see `Grid.cell_weights`.

    Raises:
        DataError: if a channel has no values where the area counts.
    """
    part = (mask * areas).sum(axis=(-2, -1), keepdims=True)
    if not part.all():
        nothing = int((part == 0).ravel().argmax())
        raise DataError(f"{channels[nothing].name} has no value that counts: all lie in data.boundary, or are missing")
    return torch.from_numpy(mask / part)[:, rows.start : rows.stop]


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
