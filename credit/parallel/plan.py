"""What a training step costs on a mesh, found without a device: one rank's step is run on tensors without values.

The model is laid out as `parallelize` lays it out, with the rules and the exchanges of the real thing, on the meta
device; only the wire is replaced by one that counts. Memory is that of the storages that are alive at the worst
moment of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from credit.config.parallelism import Sharding
from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.gathered import gathers_recorded
from credit.domain_parallel.groups import CountingRanks, Traffic
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.slices import slices
from credit.errors import ConfigError
from credit.parallel.channels import ChannelGroup
from credit.parallel.fsdp2 import fsdp_blocks, recompute_activations
from credit.parallel.mesh import MeshShape
from credit.parallel.meters import Meter
from credit.parallel.tensor_parallel import cut_channels

ADAMW_STATES = 2
"""Tensors of AdamW for each parameter: the moments."""


@dataclass(frozen=True)
class StepCost:
    """Of one rank and one optimiser step. Bytes.

    Attributes:
        parameters, optimizer: what is kept between steps.
        step: what a step adds at its worst moment: activations, gradients, gathered parameters.
        flops: floating-point operations of convolutions and products of matrices, forward and backward.
        domain, tensor, data: sent by this rank over the domain, tp and dp x domain groups; sums as a ring does them.
        collectives: number of collective calls, all groups.
        messages: number of halo messages.
        gathered: calls that have no sharded form and are computed on whole fields, with module and line.
    """

    parameters: int
    optimizer: int
    step: int
    flops: int
    domain: int
    tensor: int
    data: int
    collectives: int
    messages: int
    gathered: tuple[str, ...]

    @property
    def memory(self) -> int:
        return self.parameters + self.optimizer + self.step


@dataclass(frozen=True)
class SlicedCost:
    """Of one device, on which a model runs on slices that take turns. Bytes.

    Attributes:
        number: of slices; 1 is the plain model.
        memory: at the worst moment of a step of training, or of a forecast, parameters and optimiser included.
        resting: of what waits elsewhere, at most.
        moved: copied there and back in a step.
    """

    number: int
    memory: int
    resting: int
    moved: int


@dataclass(frozen=True)
class _Simulated:
    """What does not depend on the number of replicas: see `StepCost`."""

    peak: int
    flops: int
    weights: _Weights
    domain: Traffic
    tensor: Traffic
    gathered: tuple[str, ...]


class Work(NamedTuple):
    """What one optimiser step computes."""

    samples: int
    """Over all ranks."""
    rollout: int = 1
    detached: bool = False
    """No gradient goes from a step of the rollout to the one before."""
    members: int = 1
    """Of an ensemble, each sample."""


class Planner:
    """Costs of one model's training step on many meshes; each layout of a replica is run once.

    Args:
        build: makes the plain model for a number of latitudes.
        field: (channels, latitudes, longitudes) of the input, the whole globe. Latitudes are rounded up to a multiple
            of the domain: the cost is that of the rank with most rows.
        sharding: of the config. What it says of the mesh's sizes is not looked at: `cost` is asked of one.
        work: of one optimiser step.
        custom_converters: for `convert_to_domain_parallel`.
    """

    def __init__(
        self,
        build: Callable[[int], nn.Module],
        field: tuple[int, int, int],
        sharding: Sharding,
        work: Work,
        custom_converters: Mapping[Any, Converter] | None = None,
    ) -> None:
        self.build, self.field, self.converters = build, field, custom_converters
        self.sharding, self.work = sharding, work
        self.together = 1 if work.detached else work.rollout  # steps of a rollout that one backward joins
        self.forwards = sharding.accumulate * work.rollout
        self._simulated: dict[tuple[int, int, int, bool], _Simulated] = {}

    def cost(self, shape: MeshShape) -> StepCost:
        """The cost of one rank.

        Raises:
            TensorParallelError, DomainParallelError: if the model cannot be laid out like this.
            ConfigError: if the batch does not divide over the replicas, or a rank would have no row.
        """
        data, samples = self.sharding.parallelism.data, self._samples(shape.dp)
        if shape.domain > self.field[1]:
            raise ConfigError(f"{self.field[1]} latitudes cannot be cut over domain: {shape.domain}")
        reduced = shape.dp * shape.domain
        over = reduced if self.sharding.shard_over == "dp_domain" else shape.dp
        sharded = over if data == "fsdp2" else 1
        key = (shape.tp, shape.domain, samples, sharded > 1)
        if key not in self._simulated:
            self._simulated[key] = self._simulate(*key)
        found = self._simulated[key]
        weights, domain, tensor = found.weights, found.domain, found.tensor
        passes = self.forwards // self.together
        return StepCost(
            parameters=weights.stored // sharded,
            optimizer=ADAMW_STATES * weights.stored // sharded,
            step=found.peak + weights.beside_step(sharded, reduced, data),
            flops=passes * found.flops,
            domain=passes * (domain.bytes + _ring(domain.collective_bytes, shape.domain)),
            tensor=passes * _ring(tensor.collective_bytes, shape.tp),
            data=weights.sent(sharded, reduced, self.forwards),
            collectives=passes * (domain.collectives + tensor.collectives)
            + weights.collectives(sharded, reduced, self.forwards),
            messages=passes * domain.messages,
            gathered=found.gathered,
        )

    def sliced(self, number: int, is_training: bool, replicas: int = 1) -> SlicedCost:
        """The cost of a whole model on slices of one device: all of them run, on tensors without values.

        Args:
            number: of slices; 1 for none.
            is_training: a step of training; one of a forecast if not, of one sample.
            replicas: that share a batch.

        Raises:
            DomainParallelError: if something in the model is refused.
            ConfigError: if the batch does not divide over the replicas.
        """
        sharding, work, samples = self.sharding, self.work, self._samples(replicas)
        channels, latitudes, longitudes = self.field
        with torch.device("meta"):
            model = self.build(latitudes)
        blocks, dtype = self._prepared(model)
        stored = _Weights(model, blocks, sharding).stored
        batch = samples * work.members if is_training else 1
        x = torch.zeros(batch, channels, latitudes, longitudes, dtype=dtype, device="meta")
        with slices(model, number, custom_converters=self.converters, fallback=sharding.fallback) as parking:
            meter = _measured(model, x, self.together) if is_training else _forecast(model, x)
        # Beside the input: targets, or a forecast's states, which are in double precision.
        kept = 1 + work.rollout if is_training else 1 + 2 * torch.float64.itemsize // dtype.itemsize
        weights = (1 + ADAMW_STATES) * stored if is_training else stored
        passes = self.forwards // self.together if is_training else 1
        memory = weights + kept * x.nbytes + meter.peak + parking.peak
        return SlicedCost(number, memory, parking.peak_parked, passes * parking.moved)

    def _samples(self, replicas: int) -> int:
        """Of one replica, in one part of a batch."""
        parts = replicas * self.sharding.accumulate
        samples, rest = divmod(self.work.samples, parts)
        if rest:
            raise ConfigError(
                f"batch_size {self.work.samples} does not divide by dp x accumulate {self.sharding.accumulate}"
            )
        return samples

    def _prepared(self, model: nn.Module) -> tuple[list[nn.Module], torch.dtype]:
        """Its blocks, and the type that it computes in, which it has then."""
        sharding, blocks = self.sharding, fsdp_blocks(model)
        if sharding.activation_checkpointing:
            recompute_activations(blocks)
        dtype = torch.bfloat16 if sharding.precision == "bf16" else getattr(torch, sharding.dtype)
        model.to(dtype)
        return blocks, dtype

    def _simulate(self, tp: int, domain: int, samples: int, sharded: bool) -> _Simulated:
        """One forward and backward of a rank, on tensors without values."""
        sharding, work = self.sharding, self.work
        channels, latitudes, longitudes = self.field
        rows = -(-latitudes // domain)
        channels_of = ChannelGroup(CountingRanks(0, tp))
        manager = DomainParallelManager.of_group(CountingRanks(domain // 2, domain))
        with torch.device("meta"):
            model = self.build(rows * domain)
        if tp > 1:
            model = cut_channels(model, channels_of)
        model = convert_to_domain_parallel(
            model, manager, custom_converters=self.converters, fallback=sharding.fallback
        )
        blocks, dtype = self._prepared(model)
        x = torch.zeros(samples * work.members, channels, rows, longitudes, dtype=dtype, device="meta")
        with _gradients_leave(model) if sharded else nullcontext(), gathers_recorded() as gathers:
            meter = _measured(model, x, self.together)
        peak = meter.peak + (1 + work.rollout) * x.nbytes  # the input, and targets
        weights = _Weights(model, blocks, sharding)
        gathered = tuple(map(str, gathers))
        return _Simulated(peak, meter.flops, weights, manager.traffic, channels_of.traffic, gathered)


def _measured(model: nn.Module, x: Tensor, steps: int) -> Meter:
    """A rollout and its backward; bytes without the parameters and the input."""
    meter = Meter()
    meter.ignore([*model.parameters(), *model.buffers(), x])
    with meter:
        y = model(x)
        loss = y.square().mean()
        state = min(x.shape[1], y.shape[1])  # or less, where some of what is made is not given
        for _ in range(1, steps):
            y = y + model(torch.cat([x[:, :state] + y[:, :state], x[:, state:]], dim=1))
            loss = loss + y.square().mean()
        loss.backward()
    return meter


@torch.no_grad()
def _forecast(model: nn.Module, x: Tensor) -> Meter:
    """A step of a forecast; bytes without the parameters and the input."""
    meter = Meter()
    meter.ignore([*model.parameters(), *model.buffers(), x])
    with meter:
        model(x).double()
    return meter


@contextmanager
def _gradients_leave(model: nn.Module) -> Any:
    """Whole gradients do not stay: FSDP2 keeps this rank's shard of each."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    yield
    for hook in hooks:
        hook.remove()


def _ring(given: int, ranks: int) -> int:
    """Bytes that a rank sends for all_reduces of `given` bytes in all (Patarasuk & Yuan 2009)."""
    return 2 * given * (ranks - 1) // ranks


class _Weights:
    """Sizes of a model's parameters, by the groups in which FSDP2 gathers them."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], sharding: Sharding) -> None:
        stored = torch.empty((), dtype=getattr(torch, sharding.dtype)).itemsize
        self.again = sharding.reshard_after_forward
        self.computed = 2 if sharding.precision == "bf16" else stored
        counted: set[nn.Parameter] = set()
        numbers = []
        for group in [*reversed(blocks), model]:
            mine = [p for p in group.parameters() if p not in counted]
            counted.update(mine)
            numbers.append(sum(p.numel() for p in mine))
        self.groups = [n for n in numbers if n]
        self.stored = stored * sum(numbers)
        self.wire = self.computed * sum(numbers)

    def beside_step(self, sharded: int, reduced: int, data: str) -> int:
        """What is there at the worst moment besides activations: gathered parameters, shards of gradients, buckets."""
        if sharded > 1:
            return self.stored // sharded + self.computed * (sum(self.groups[-1:]) + max(self.groups))
        return self.stored if data == "ddp" and reduced > 1 else 0

    def sent(self, sharded: int, reduced: int, forwards: int) -> int:
        """Bytes for parameters and gradients.

        Gradients once around; where they are sharded each block is gathered before each forward and, having been
        dropped, before its backward, the rest once for both, and each gradient is scattered once.
        """
        if sharded == 1:
            return _ring(self.stored, reduced)
        again = self.computed * sum(self.groups[:-1]) if self.again else 0
        inside = (forwards * (self.wire + again) + self.stored) * (sharded - 1) // sharded
        return inside + _ring(self.stored // sharded, reduced // sharded)

    def collectives(self, sharded: int, reduced: int, forwards: int) -> int:
        if sharded > 1:
            groups = len(self.groups)
            return forwards * (2 * groups - 1 if self.again else groups) + groups
        return int(reduced > 1)
