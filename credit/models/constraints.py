"""What a forecast must satisfy after each step: plain modules that correct what a model predicts.

They see whole fields in their own units, as a model does, and are cut over a mesh by the same rules: a mean over the
globe is that of the globe on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from credit.config import Constraint
from credit.data.store import Channel
from credit.dotted import call_dotted
from credit.errors import ConfigError


class NonNegative(nn.Module):
    """No value of `variables` below 0 (within the rounding of `trainer.dtype`).

    Args:
        channels: that the model predicts.
        areas: of the rows of cells over the mean, (latitude, 1).
        variables: names of variables, or of single channels such as "q_500".
    """

    mask: Tensor

    def __init__(self, channels: Sequence[Channel], areas: Tensor, variables: Sequence[str]) -> None:
        super().__init__()
        variables = [variables] if isinstance(variables, str) else variables
        chosen = {place for name in variables for place in _places(channels, name)}
        mask = torch.tensor([place in chosen for place in range(len(channels))])
        self.register_buffer("mask", mask[:, None, None], persistent=False)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.where(self.mask, after.clamp(min=0), after)


class Conserve(nn.Module):
    """The mean over the globe of a weighted sum is that before the step, plus what came in: `adjust` is mended.

    mean(sum terms x after) = mean(sum terms x before) + mean(sum sources x after). The mass of dry air, with surface
    pressure in Pa and the water of the column in kg m-2: terms {sp: 1, tcwv: -9.80665}, adjust sp. The water of the
    column, with precipitation and evaporation in kg m-2 a step: terms {tcwv: 1}, sources {tp: -1, e: 1}, adjust tcwv.

    Args:
        channels: that the model predicts.
        areas: of the rows of cells over the mean, (latitude, 1).
        terms: factors of channels of the state.
        adjust: which of them is changed.
        sources: factors of predicted channels.
        by: scale multiplies `adjust`, which keeps its sign; shift adds the same everywhere.
    """

    areas: Tensor
    terms: Tensor
    sources: Tensor
    chosen: Tensor

    def __init__(
        self,
        channels: Sequence[Channel],
        areas: Tensor,
        terms: Mapping[str, float],
        adjust: str,
        sources: Mapping[str, float] | None = None,
        by: Literal["scale", "shift"] = "scale",
    ) -> None:
        super().__init__()
        if by not in ("scale", "shift"):
            raise ConfigError(f"constraints: conserve: by is scale or shift, not {by!r}")
        if not terms.get(adjust):
            raise ConfigError(f"constraints: conserve: adjust: {adjust} is not among the terms {dict(terms)}")
        self._by = by
        vectors = {
            "terms": _vector(channels, terms),
            "sources": _vector(channels, sources or {}),
            "chosen": _vector(channels, {adjust: terms[adjust]}),
        }
        for name, vector in vectors.items():
            self.register_buffer(name, vector, persistent=False)
        self.register_buffer("areas", areas, persistent=False)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        channels = before.shape[1]
        if self.terms[channels:].any():
            raise ConfigError(
                "constraints: conserve: terms must be of data.variables: a diagnostic has no value before"
            )
        mean = self._mean(after)
        missing = self._mean(before) @ self.terms[:channels] + mean @ self.sources - mean @ self.terms
        if self._by == "shift":
            add = missing[:, None] * (self.chosen != 0) / self.chosen.sum()
            return after + add[:, :, None, None]
        factor = 1 + (missing / (mean @ self.chosen))[:, None] * (self.chosen != 0)
        return after * factor[:, :, None, None]

    def _mean(self, fields: Tensor) -> Tensor:
        """Over the globe: (batch, channel)."""
        return (fields * self.areas).mean(dim=(-2, -1))


CONSTRAINTS: dict[str, type[nn.Module]] = {"nonnegative": NonNegative, "conserve": Conserve}


class Constrained(nn.Module):
    """A model, and constraints that correct what it predicts, in the order of the config.

    Args:
        model: from normalised inputs to the change of the state, and diagnostics, in units of `unit`.
        constraints: modules that make (before, after) into what is after the step: (batch, channel, latitude,
            longitude) each, in the fields' own units and float64; before of the state, after of all that is predicted.
        mean, std, unit: float64, (predicted channel, 1, 1).
        state: channels of the state.
    """

    mean: Tensor
    std: Tensor
    unit: Tensor

    def __init__(
        self, model: nn.Module, constraints: Sequence[nn.Module], mean: Tensor, std: Tensor, unit: Tensor, state: int
    ) -> None:
        super().__init__()
        self.model, self.constraints, self._state = model, nn.ModuleList(constraints), state
        for name, value in (("mean", mean), ("std", std), ("unit", unit)):
            self.register_buffer(name, value, persistent=False)

    @property
    def fsdp_blocks(self) -> Any:
        """The model's, see `credit.parallel.fsdp2`."""
        return getattr(self.model, "fsdp_blocks", ())

    def forward(self, x: Tensor) -> Tensor:
        made, state = self.model(x), self._state
        now, change = x[:, :state].double(), made.double() * self.unit
        later = torch.cat([now + change[:, :state], change[:, state:]], dim=1)
        before = now * self.std[:state] + self.mean[:state]
        after = later * self.std + self.mean
        mended = after
        for constraint in self.constraints:
            mended = constraint(before, mended)
        # What no constraint touches is what the model made, to the last bit.
        return made + ((mended - after) / (self.std * self.unit)).to(made.dtype)


def build_constraints(wanted: Sequence[Constraint], channels: Sequence[Channel], areas: Tensor) -> list[nn.Module]:
    """The modules that a config names.

    Raises:
        ConfigError: if one cannot be built of its keys.
    """
    built = []
    for constraint in wanted:
        keys = constraint.model_dump(exclude={"name"})
        path = constraint.name
        if path in CONSTRAINTS:
            path = f"{__name__}.{CONSTRAINTS[path].__name__}"
        module = call_dotted(path, f"constraints: {constraint.name}", channels, areas, **keys)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"constraints: {constraint.name} gives no torch.nn.Module, but {type(module).__name__}")
        if any(True for _ in module.parameters()):
            raise ConfigError(f"constraints: {constraint.name} has parameters: what is trained belongs into the model")
        built.append(module)
    return built


def _places(channels: Sequence[Channel], name: str) -> list[int]:
    found = [place for place, channel in enumerate(channels) if name in (channel.variable, channel.name)]
    if not found:
        known = ", ".join(channel.name for channel in channels)
        raise ConfigError(f"constraints: {name} is not among what is predicted: {known}")
    return found


def _vector(channels: Sequence[Channel], factors: Mapping[str, float]) -> Tensor:
    """Factors by channel, float64; a variable on levels has its factor on each."""
    vector = torch.zeros(len(channels), dtype=torch.float64)
    for name, factor in factors.items():
        vector[_places(channels, name)] = float(factor)
    return vector
