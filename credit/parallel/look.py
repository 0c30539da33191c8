"""A first look at a model, before it is replicated: what would make its numbers depend on how a batch is shared out.

Found by running it on one sample and on two, not by the names of its classes: statistics that it keeps in buffers,
samples that it mixes, random numbers, parameters that it does not use.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit.domain_parallel.generators import GENERATORS, generator_states, seed_torch
from credit.domain_parallel.modules_state import ModulesState
from credit.domain_parallel.slab import class_name
from credit.errors import ConfigError, CreditError
from credit.parallel.draws import Plan, Recorded, SampleDraws

logger = logging.getLogger(__name__)

SAME = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative to the largest: what a kernel for another batch size may change; in types that are not named, 0.05."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        draws: what the forward draws, by sample or by batch; None if that cannot be told apart.
        moving: names of the buffers that a forward changes, to the same values whatever the samples are.
        means: names of those that it changes by the mean over the samples.
        unused: names of the parameters that get no gradient.
    """

    draws: Plan | None
    moving: tuple[str, ...]
    means: tuple[str, ...]
    unused: tuple[str, ...]

    def sampled(self, samples: Sequence[tuple[int, ...]]) -> Any:
        """While it lasts, what the model draws is a function of these samples."""
        return SampleDraws(self.draws, samples) if self.draws else nullcontext()


def look_at(model: nn.Module, forward: Forward, two: Tensor, is_shared_out: bool) -> Look:
    """Run `model` in training mode, and leave it and the generators as they were.

    Args:
        forward: calls the model.
        two: two samples that differ, this rank's rows.
        is_shared_out: a batch is computed in parts, by several replicas or one after another.

    Raises:
        ConfigError: naming what in the model would give other numbers than one device does, if batches are shared
            out; and what a resumed run would not have.
    """
    one = two[:1]
    with _kept(model) as (state, before):
        with torch.no_grad():
            recorded = [_recorded(forward, x) for x in (one, two)]
        _warn_of_numbers(model, state.changed_numbers())
        draws, problem = None, ""
        try:
            draws = Plan(*recorded)
        except CreditError as error:
            problem = str(error)
        look = Look(draws, (), (), ())

        def begin() -> None:
            state.restore()
            restore_buffers(model, before)
            seed_torch(1)

        def run(x: Tensor, samples: list[tuple[int, ...]]) -> tuple[Tensor, dict[str, Tensor]]:
            begin()
            with look.sampled(samples):
                y = forward(x)
            return y, _buffers(model)

        with torch.no_grad():
            first, kept = run(one, [(0,)])
            _, kept_of_other = run(two[1:], [(0,)])
            both, kept_of_both = run(two, [(0,), (1,)])
        moving = [name for name, value in kept.items() if not torch.equal(value, before[name])]
        of_data = [name for name in moving if not torch.equal(kept[name], kept_of_other[name])]
        means = [name for name in of_data if _is_mean(kept[name], kept_of_other[name], kept_of_both[name])]
        _refuse_lost(model, moving)
        if is_shared_out:
            _refuse_statistics(model, [name for name in of_data if name not in means])
            _refuse_mixing(model, problem, _are_same(first[0], both[0]))
        begin()
        unused = _unused(model, forward, one, look)
    return Look(draws, tuple(name for name in moving if name not in of_data), tuple(means), unused)


@contextmanager
def _kept(model: nn.Module) -> Iterator[tuple[ModulesState, dict[str, Tensor]]]:
    """Buffers, attributes, mode and generators are afterwards what they were. Gives attributes and buffers.

    Raises:
        ConfigError: if numpy's or Python's generator was used meanwhile.
    """
    before, was_training = _buffers(model), model.training
    generators, python, numpy = generator_states(), random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        model.train()
        state = ModulesState(model)
        try:
            yield state, before
        finally:
            state.restore()
            model.train(was_training)
            restore_buffers(model, before)
    drawn = [name for name, a, b in zip(GENERATORS, generators, generator_states(), strict=True) if a != b]
    random.setstate(python)
    np.random.set_state(numpy)
    if drawn:
        raise ConfigError(
            f"{class_name(model)} draws from {drawn[0]}'s generator in its forward, which is not the same on every "
            f"rank, nor after a resume: draw with torch"
        )


def _recorded(forward: Forward, x: Tensor) -> list[Any]:
    with Recorded() as recorded:
        forward(x)
    return recorded.seen


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def restore_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put values back, into buffers that may be other tensors by now."""
    for name, value in values.items():
        path, _, bare = name.rpartition(".")
        owner = model.get_submodule(path)
        if owner._buffers[bare] is not None and owner._buffers[bare].shape == value.shape:  # type: ignore[union-attr]
            owner._buffers[bare].copy_(value)  # type: ignore[union-attr]
        else:
            owner._buffers[bare] = value.clone()


def _is_mean(a: Tensor, b: Tensor, of_both: Tensor) -> bool:
    return of_both.is_floating_point() and _are_same((a + b) / 2, of_both)


def _are_same(a: Tensor, b: Tensor) -> bool:
    off, size = (a - b).abs().max(), b.abs().max()
    return bool(off <= SAME.get(a.dtype, 0.05) * size) or bool(size == 0)


def _refuse_lost(model: nn.Module, moving: list[str]) -> None:
    saved = model.state_dict().keys()
    lost = [name for name in moving if name not in saved]
    if lost:
        raise ConfigError(
            f"{_named(model, lost)}: a forward changes this buffer, and checkpoints do not hold it, so a resumed run "
            f"would not be the uninterrupted one: register it with persistent=True"
        )


def _warn_of_numbers(model: nn.Module, names: list[str]) -> None:
    if names and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.warning(
            "%s: a forward changes this number, and checkpoints do not hold it, so a resumed run begins with it anew: "
            "if outputs depend on it, make it a buffer",
            _named(model, names),
        )


def _refuse_statistics(model: nn.Module, of_data: list[str]) -> None:
    if of_data:
        raise ConfigError(
            f"{_named(model, of_data)}: this buffer keeps statistics of the samples of one forward, no mean over "
            f"them, so several replicas, or trainer.accumulate, do not give the numbers of one device: use GroupNorm, "
            f"say, or one replica (a larger domain or tensor) and accumulate: 1"
        )


def _refuse_mixing(model: nn.Module, problem: str, is_apart: bool) -> None:
    if problem or not is_apart:
        raise ConfigError(
            f"{class_name(model)} does not give a sample of a batch what it gives the sample alone"
            f"{': ' + problem if problem else ', because it mixes samples or draws across them'}. So several replicas, "
            f"or trainer.accumulate, do not give the numbers of one device: take one replica (a larger domain or "
            f"tensor), and accumulate: 1"
        )


def _named(model: nn.Module, names: list[str]) -> str:
    owner = model.get_submodule(names[0].rpartition(".")[0])
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} ({class_name(owner)}){more}"


def _unused(model: nn.Module, forward: Forward, x: Tensor, look: Look) -> tuple[str, ...]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        return ()
    with look.sampled([(0,)]):
        y = forward(x)
        if not y.requires_grad:
            return tuple(named)
        gradients = torch.autograd.grad(y.square().sum(), [*named.values()], allow_unused=True)
    return tuple(name for name, gradient in zip(named, gradients, strict=True) if gradient is None)


class StepBuffers:
    """Buffers that a forward changes, through one optimiser step: they end as if the batch had been one.

    Each part of a batch begins with them as the step did. Those that change by a mean over samples are averaged over
    parts and replicas.

    Args:
        parts: of the batch.
        group: the replicas; None for one.
    """

    def __init__(self, model: nn.Module, look: Look, parts: int, group: dist.ProcessGroup | None) -> None:
        self.model, self.means, self.parts, self.group = model, look.means, parts, group
        changing = (*look.moving, *look.means) if parts > 1 else ()
        self.first = {name: model.get_buffer(name).clone() for name in changing}
        self.totals: dict[str, Tensor] = {}

    def begin_part(self) -> None:
        restore_buffers(self.model, self.first)

    def end_part(self) -> None:
        for name in self.means:
            value = self.model.get_buffer(name).detach()
            self.totals[name] = self.totals[name] + value if name in self.totals else value.clone()

    def end_step(self) -> None:
        """Called by all replicas."""
        replicas = 1 if self.group is None else self.group.size()
        for total in self.totals.values() if replicas > 1 else ():
            dist.all_reduce(total, group=self.group)
        restore_buffers(self.model, {name: total / (self.parts * replicas) for name, total in self.totals.items()})
