"""From a store to batches of normalised tensors, on this rank's latitude rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from credit.config import Config, Data
from credit.data.sampler import Draw
from credit.data.statistics import Statistics, refuse_other_gaps
from credit.data.store import Channel, FieldStore, forcing_fields, static_fields
from credit.errors import DataError


class Fields:
    """What the config asks for of a store: channels, normalised, on `rows`.

    Args:
        beyond: for a forecast of which no truth is stored: there need be no diagnostics, nor forcings at all times.

    Attributes:
        predicted: channels that the model makes: those of the state, then the diagnostics.
        state_channels: how many are of the state.
        input_channels: of the model, see `Config.model_channels`.
        channel_unit: of what the model makes, in units of std, (predicted channel, 1, 1): for the state the root mean
            square of its change in a step, for a diagnostic, which has no change, 1.
        unit: that, and 0 where values are always missing, then (predicted channel, row, longitude).
        given_moments: (mean, std) of forcings and statics that are read.
        statics: normalised, float32, (static, row, longitude).
        mask: true where they are not, of the globe: (predicted channel, latitude, longitude); None if they never are.
        edge: true where the state is given after each step, of a region: (row, longitude); None if it is nowhere.
    """

    def __init__(
        self, config: Config, store: FieldStore, statistics: Statistics, rows: range, beyond: bool = False
    ) -> None:
        data = config.data
        self.config, self.store, self.rows = config, store, rows
        state = store.channels(data.variables, data.levels)
        made = data.diagnostics
        diagnostics = channels_of(made, data, statistics) if beyond else store.channels(made, data.levels)
        self.predicted: list[Channel] = [*state, *diagnostics]
        self._beyond = statistics.forcings.on(store.grid) if beyond else None
        self.state_channels = len(state)
        names = [channel.name for channel in self.predicted]
        self._mean, self._std = (array[:, None, None] for array in statistics.arrays(names))
        increments = np.array([statistics.increment_std[name] for name in names])[:, None, None] / self._std
        increments[len(state) :] = 1
        self.channel_unit = torch.from_numpy(increments).float()
        self.mask = np.isfinite(statistics.climatology_of(names, store.grid)) if data.masked else None
        self.unit = self.channel_unit
        if self.mask is not None:  # where values are missing, nothing changes
            self._mask = self.mask[:, rows.start : rows.stop]
            self.unit = self.channel_unit * torch.from_numpy(self._mask)
        self.edge = None
        if data.boundary:
            self.edge = torch.from_numpy(store.grid.at_edge(data.boundary)[rows.start : rows.stop])
        self.input_channels, _ = config.model_channels(len(state), len(names) - len(state))
        # Not all of the statistics: a worker is sent what is here, and their climatology is as large as a state.
        self.given_moments = {name: (statistics.mean[name], statistics.std[name]) for name in data.given}
        statics = self._scaled(static_fields(store, data.statics, rows)[None], data.statics)[0]
        self.statics = torch.from_numpy(statics)
        in_memory = data.in_memory and not beyond
        self._memory = store.read(self.predicted, range(len(store.times)), rows) if in_memory else None

    def state(self, indices: list[int]) -> Tensor:
        """Normalised predicted fields at times of the store: float32, (time, channel, row, longitude)."""
        return self._normalised(indices, len(self.predicted))

    def _normalised(self, indices: list[int], channels: int) -> Tensor:
        """The first of the predicted, in place in the float32 that is read; 0, the mean, where values are missing."""
        if self._memory is None:
            fields = self.store.read(self.predicted[:channels], indices, self.rows)
        else:
            fields = self._memory[indices, :channels]
        np.subtract(fields, self._mean[:channels].astype(np.float32), out=fields)
        np.divide(fields, self._std[:channels].astype(np.float32), out=fields)
        return torch.from_numpy(fields if self.mask is None else self._filled(fields, self.store.times[indices]))

    def _filled(self, scaled: np.ndarray, times: np.ndarray) -> np.ndarray:
        wanted = self._mask[: scaled.shape[1]]
        for time, field in zip(times, scaled, strict=True):
            refuse_other_gaps(np.isfinite(field), wanted, self.predicted, time)
        return np.nan_to_num(scaled, nan=0.0)

    def history(self, times: np.ndarray, newest: int = 0) -> Tensor:
        """Normalised states that the model is given at `times`: float32, (time, state, channel, row, longitude).

        Args:
            newest: steps before `times` of the first; the others follow, each one step older.
        """
        data = self.config.data
        back = np.arange(newest, data.history) * data.step
        indices = self.store.indices((times[:, None] - back).ravel())
        return self._normalised(indices, self.state_channels).unflatten(0, (len(times), len(back)))

    def newest(self, times: np.ndarray) -> Tensor:
        """Normalised states at `times`: float32, (time, channel, row, longitude)."""
        return self._normalised(self.store.indices(times), self.state_channels)

    def forcings(self, times: np.ndarray) -> Tensor:
        """Normalised forcings at `times`: float32, (time, forcing, row, longitude)."""
        names = self.config.data.forcings
        fields = forcing_fields(self.store, names, times, self.rows, self._beyond)
        return torch.from_numpy(self._scaled(fields, names))

    def given(self, times: np.ndarray) -> Tensor:
        """Normalised forcings at `times`, and statics: float32, (time, forcing + static, row, longitude)."""
        return torch.cat([self.forcings(times), self.statics.expand(len(times), -1, -1, -1)], dim=1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean, std) of the predicted channels, in their own units: float64, (channel, 1, 1)."""
        return torch.from_numpy(self._mean), torch.from_numpy(self._std)

    def physical(self, state: Tensor) -> np.ndarray:
        """A normalised state in its own units: float32, (..., channel, row, longitude)."""
        return (state.double().cpu().numpy() * self._std + self._mean).astype(np.float32)

    def _scaled(self, fields: np.ndarray, names: list[str]) -> np.ndarray:
        """Fields from the store normalised; computed ones are of order one as they are."""
        for i, name in enumerate(names):
            if name in self.given_moments:
                mean, std = self.given_moments[name]
                fields[:, i] = (fields[:, i] - mean) / std
                if self.config.data.missing.get(name) == "mask":
                    fields[:, i] = np.nan_to_num(fields[:, i], nan=0.0)
        return fields


def channels_of(variables: list[str], data: Data, statistics: Statistics) -> list[Channel]:
    """Those of variables that no store need have, as statistics know them."""
    found: list[Channel] = []
    for name in variables:
        on_levels = [Channel(name, level) for level in data.levels]
        known = [one for one in (Channel(name), *on_levels) if one.name in statistics.mean]
        if not known:
            raise DataError(f"the statistics know nothing of {name}: run `credit data stats CONFIG`")
        found += known
    return found


class StepDataset(Dataset[Any]):
    """Samples: the inputs at a start, and what is predicted of each of the next `trainer.rollout` steps.

    A batch is a dictionary of `x` (batch, input channel, row, longitude); `y` (batch, step, predicted channel, row,
    longitude), in units of `Fields.unit`, of a diagnostic the field itself; `forcings` (batch, step - 1, forcing, row,
    longitude), at the steps after the first, if there are any; `weight` (batch,), `sample` (batch,) and `time`
    (batch,), seconds since 1970 of the start.
    """

    def __init__(self, fields: Fields, period: str) -> None:
        data, store = fields.config.data, fields.store
        self.fields = fields
        self.steps = fields.config.trainer.rollout
        self.starts = store.starts(getattr(data, period), data.step, self.steps, data.gaps, data.history)
        self._step = data.step

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        starts = self.starts[[draw.sample for draw in draws]]
        times = self.fields.store.times[starts]
        ahead = times[:, None] + self._step * np.arange(1, self.steps + 1)
        after = self.fields.store.indices(ahead.ravel())
        both = self.fields.state([*starts.tolist(), *after])
        now, later = both[: len(draws)], both[len(draws) :].unflatten(0, ahead.shape)
        state = self.fields.state_channels
        later[:, :, :state] -= now[:, None, :state]
        states = [now[:, :state]]
        if self.fields.config.data.history > 1:
            states.append(self.fields.history(times, newest=1).flatten(1, 2))
        further = {}
        if self.steps > 1:
            forcings = self.fields.forcings(ahead[:, :-1].ravel())
            further["forcings"] = forcings.unflatten(0, (len(draws), self.steps - 1))
        return {
            "x": torch.cat([*states, self.fields.given(times)], dim=1),
            "y": later / self.fields.channel_unit,
            **further,
            "weight": torch.tensor([draw.weight for draw in draws]),
            "sample": torch.tensor([draw.sample for draw in draws]),
            "time": torch.from_numpy(times.astype("datetime64[s]").astype(np.int64)),
        }
