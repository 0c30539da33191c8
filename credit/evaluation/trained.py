"""A trained model from its directory alone, rolled forward: the numbers of `credit forecast`, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from credit.config.models import Custom
from credit.data.grid import COS_ZENITH, cos_zenith
from credit.errors import CheckpointError, CreditError
from credit.evaluation.forecast import advance
from credit.evaluation.package import WEIGHTS, Described, refuse_changed
from credit.models import build_model
from credit.models.constraints import Constrained, build_constraints
from credit.parallel.weights import load_plain
from credit.steps import of_months
from credit.training.noise import Noise, of_member


class Trained(nn.Module):
    """A model with all that turns fields into what it is given, and what it makes into fields.

    Args:
        directory: that `credit export` wrote.
        trust: import and call what `config.json` names by dotted paths of others' code.

    Attributes:
        described: what it is of: `channels`, `grid`, `normalisation`, `config`.
        model: the plain model.

    Raises:
        CheckpointError: if a file is missing, damaged or not the one that was certified; if it names others' code that
            is not trusted; or if the model is of a region whose boundary must be given.
    """

    def __init__(self, directory: Path, trust: bool = False) -> None:
        super().__init__()
        refuse_changed(directory)
        said = self.described = Described(directory)
        config, names = said.config, [channel.name for channel in said.channels]
        if config.data.boundary:
            raise CheckpointError(f"{directory} is of a region whose boundary is given: take `credit forecast`")
        foreign = [one.name for one in config.constraints if "." in one.name]
        foreign += [config.model.name] if isinstance(config.model, Custom) else []
        if foreign and not trust:
            raise CheckpointError(f"{directory} names code of others, {foreign[0]}: trust it to have it imported")
        channels = config.model_channels(said.state, len(names) - said.state)
        model = build_model(config.model, *channels, said.grid.shape, said.grid.region)
        self.dtype = getattr(torch, config.trainer.dtype)
        self.model = model.to(self.dtype)
        load_plain(self.model, directory / WEIGHTS)
        numbers = [said.normalisation[name] for name in names]
        self._mean, self._std, change = (
            torch.tensor([one.get(key, one["std"]) for one in numbers], dtype=torch.float64)[:, None, None]
            for key in ("mean", "std", "increment_std")
        )
        unit = (change / self._std).float()  # of a diagnostic, which has no change, 1
        self._step: nn.Module = self.model
        if config.constraints:
            areas = torch.from_numpy(said.grid.latitude_weights())[:, None]
            constraints = build_constraints(config.constraints, said.channels, areas)
            self._step = Constrained(self.model, constraints, self._mean, self._std, unit.double(), said.state)
        self._unit = unit if said.mask is None else unit * said.mask
        self.eval()

    def normalised(self, states: Tensor) -> list[Tensor]:
        """What `steps` begins with.

        Args:
            states: in their own units, float32, (start, history, state channel, latitude, longitude); the newest first.

        Raises:
            CreditError: if they are of another shape; one channel would be taken for each.
        """
        said, count = self.described, self.described.state
        wanted = (said.config.data.history, count, *said.grid.shape)
        if states.shape[1:] != wanted:
            channels = ", ".join(channel.name for channel in said.channels[:count])
            raise CreditError(
                f"states are of shape {tuple(states.shape)}, and must be (start, {', '.join(map(str, wanted))})",
                fix=f"give starts, states of history, the channels {channels}, latitudes and longitudes",
            )
        scaled = (states.float() - self._mean[:count].float()) / self._std[:count].float()
        if self.described.mask is not None:
            scaled = scaled.nan_to_num(nan=0.0)
        return [*scaled.double().unbind(1)]

    def physical(self, predicted: Tensor) -> Tensor:
        """What `steps` yields in its own units, float32; missing where it always is."""
        values = (predicted.cpu().double() * self._std + self._mean).float()
        mask = self.described.mask
        return values if mask is None else values.masked_fill(~mask, float("nan"))

    @torch.no_grad()
    def steps(self, states: list[Tensor], times: np.ndarray, member: int = 0) -> Iterator[Tensor]:
        """Yield what is predicted after each step, for ever: normalised, float64, (start, predicted channel, latitude,
        longitude).

        Args:
            states: of `normalised`, on the device of the model.
            times: datetime64 of the starts, UTC.
            member: of an ensemble, where the model was trained for one.
        """
        config, said, device = self.described.config, self.described, states[0].device
        step = config.data.step
        times = times.astype("datetime64[M]" if of_months(step) else "datetime64[ns]")
        unit, lead = self._unit.to(device, torch.float64), 0
        purposes = [of_member(time, member) for time in times]
        shape = said.grid.shape
        draw = Noise(config.trainer.seed, shape, range(shape[0]), device, self.dtype)
        while True:
            given = self._given(times + lead * step).to(device, self.dtype)
            noise = draw(purposes, lead) if config.noise_channels else None
            after = advance(self._step, states, given, unit, self.dtype, noise)
            states = [after[:, : said.state], *states[:-1]]
            lead += 1
            yield after

    def _given(self, times: np.ndarray) -> Tensor:
        """Forcings and statics, normalised: (time, forcing + static, latitude, longitude)."""
        said = self.described
        fields = [self._forcing(name, times) for name in said.config.data.forcings]
        statics = said.statics.expand(len(times), -1, -1, -1)
        return torch.cat([*(field[:, None] for field in fields), statics], dim=1)

    def _forcing(self, name: str, times: np.ndarray) -> Tensor:
        said = self.described
        if name == COS_ZENITH:
            return torch.from_numpy(cos_zenith(times, said.grid.latitude, said.grid.longitude))
        if said.forcings is None:
            raise CheckpointError(f"{name} is a stored forcing, and there is no climatology of it beside the model")
        field = said.forcings.at(name, times, range(said.grid.shape[0]))
        moments = said.normalisation[name]
        scaled = ((field - moments["mean"]) / moments["std"]).astype(np.float32)
        missing = said.config.data.missing.get(name) == "mask"
        return torch.from_numpy(np.nan_to_num(scaled, nan=0.0) if missing else scaled)
