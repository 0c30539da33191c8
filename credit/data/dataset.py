"""From a store to batches of normalised tensors, on this rank's latitude rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from credit.config import Config
from credit.data.sampler import Draw
from credit.data.statistics import Statistics
from credit.data.store import Channel, FieldStore, forcing_fields, static_fields, stored_names


class Fields:
    """What the config asks for of a store: channels, normalised, on `rows`.

    Attributes:
        predicted: channels of the state.
        input_channels: state, forcings, statics and, of an ensemble, noise.
        increment_std: of the predicted channels over their std, (channel, 1, 1): the model's unit of change.
    """

    def __init__(self, config: Config, store: FieldStore, statistics: Statistics, rows: range) -> None:
        data = config.data
        self.config, self.store, self.rows = config, store, rows
        self.predicted: list[Channel] = store.channels(data.variables, data.levels)
        names = [channel.name for channel in self.predicted]
        self._mean, self._std = (array[:, None, None] for array in statistics.arrays(names))
        increments = np.array([statistics.increment_std[name] for name in names])[:, None, None]
        self.increment_std = torch.from_numpy(increments / self._std).float()
        self.input_channels = len(names) + config.given_channels
        # Not all of the statistics: a worker is sent what is here, and their climatology is as large as a state.
        given = stored_names([*data.forcings, *data.statics])
        self._moments = {name: (statistics.mean[name], statistics.std[name]) for name in given}
        statics = self._scaled(static_fields(store, data.statics, rows)[None], data.statics)[0]
        self._statics = torch.from_numpy(statics)
        self._memory = store.read(self.predicted, range(len(store.times)), rows) if data.in_memory else None

    def state(self, indices: list[int]) -> Tensor:
        """Normalised state at times of the store: float32, (time, channel, row, longitude)."""
        fields = (
            self._memory[indices] if self._memory is not None else self.store.read(self.predicted, indices, self.rows)
        )
        return torch.from_numpy(((fields - self._mean) / self._std).astype(np.float32))

    def forcings(self, times: np.ndarray) -> Tensor:
        """Normalised forcings at `times`: float32, (time, forcing, row, longitude)."""
        names = self.config.data.forcings
        return torch.from_numpy(self._scaled(forcing_fields(self.store, names, times, self.rows), names))

    def given(self, times: np.ndarray) -> Tensor:
        """Normalised forcings at `times`, and statics: float32, (time, forcing + static, row, longitude)."""
        return torch.cat([self.forcings(times), self._statics.expand(len(times), -1, -1, -1)], dim=1)

    def physical(self, state: Tensor) -> np.ndarray:
        """A normalised state in its own units: float32, (..., channel, row, longitude)."""
        return (state.double().cpu().numpy() * self._std + self._mean).astype(np.float32)

    def _scaled(self, fields: np.ndarray, names: list[str]) -> np.ndarray:
        """Fields from the store normalised; computed ones are of order one as they are."""
        for i, name in enumerate(names):
            if name in self._moments:
                mean, std = self._moments[name]
                fields[:, i] = (fields[:, i] - mean) / std
        return fields


class StepDataset(Dataset):
    """Samples: the inputs at a start, and the change from there to each of the next `trainer.rollout` steps.

    A batch is a dictionary of `x` (batch, input channel, row, longitude); `y` (batch, step, predicted channel, row,
    longitude), in units of `increment_std`; `forcings` (batch, step - 1, forcing, row, longitude), at the steps after
    the first, if there are any; `weight` (batch,), `sample` (batch,) and `time` (batch,), seconds since 1970 of the
    start.
    """

    def __init__(self, fields: Fields, period: str) -> None:
        data, store = fields.config.data, fields.store
        self.fields = fields
        self.steps = fields.config.trainer.rollout
        self.starts = store.starts(getattr(data, period), data.step_hours, self.steps, data.gaps)
        self._step = np.timedelta64(data.step_hours, "h")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        starts = self.starts[[draw.sample for draw in draws]]
        times = self.fields.store.times[starts]
        ahead = times[:, None] + self._step * np.arange(1, self.steps + 1)
        after = self.fields.store.indices(ahead.ravel())
        both = self.fields.state([*starts.tolist(), *after])
        now, later = both[: len(draws)], both[len(draws) :].unflatten(0, ahead.shape)
        further = {}
        if self.steps > 1:
            forcings = self.fields.forcings(ahead[:, :-1].ravel())
            further["forcings"] = forcings.unflatten(0, (len(draws), self.steps - 1))
        return {
            "x": torch.cat([now, self.fields.given(times)], dim=1),
            "y": (later - now[:, None]) / self.fields.increment_std,
            **further,
            "weight": torch.tensor([draw.weight for draw in draws]),
            "sample": torch.tensor([draw.sample for draw in draws]),
            "time": torch.from_numpy(times.astype("datetime64[s]").astype(np.int64)),
        }
