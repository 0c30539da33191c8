"""Agreement and reductions across ranks. Everything works, as a no-op, without torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit.boundary import CAUGHT, explained
from credit.domain_parallel.constants import constants
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager, of_several
from credit.domain_parallel.partition import PartitionError
from credit.domain_parallel.torch_private import foreach_mul_, foreach_norm
from credit.errors import CreditError, UnforeseenError

USER_ERRORS = (CreditError, DomainParallelError, PartitionError)
"""What a user can fix: printed as a paragraph, without a traceback."""

BUCKET_BYTES = 25 * 2**20


@contextmanager
def together(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank, and let it fail on all ranks if it fails on one.

    Without this, the rank that meets a missing file stops while its peers wait for it.

    Raises:
        CreditError: on every rank, with what each failing rank had to say.
    """
    caught: BaseException | None = None
    try:
        yield
    except CAUGHT as error:
        caught = error
    share_failure(caught, what, group)


def share_failure(caught: BaseException | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise one error on all ranks from what each has caught, if any has.

    Raises:
        UnforeseenError: if any has caught what is not ours.
        CreditError: otherwise.
    """
    mine = None if caught is None else explained(caught)
    said = gather_objects(None if mine is None else (*mine.args[:3], isinstance(mine, UnforeseenError)), group)
    errors: dict[tuple[str, str], CreditError] = {}  # fixes differ: each rank leaves its own traceback
    ranks: dict[tuple[str, str], list[str]] = {}
    for rank, words in enumerate(said):
        if words is not None:
            errors.setdefault(words[:2], CreditError(*words[:3]))
            ranks.setdefault(words[:2], []).append(str(rank))
    if not errors:
        return
    kind = UnforeseenError if any(words is not None and words[3] for words in said) else CreditError
    cause = None if caught is mine else caught
    if len(errors) == 1 and None not in said:
        raise kind(*next(iter(errors.values())).args) from cause
    lines = "; ".join(f"on rank {', '.join(ranks[key])}: {error}" for key, error in errors.items())
    raise kind(f"{what} failed {lines}") from cause


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank of `group` (all by default), on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """Elementwise maximum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def local(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def allreduce_grads_avg(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Average gradients over `group`, in place: `GradientSums`, of which all are started now."""
    if group is not None:
        GradientSums(parameters, group).finish()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        mine = local(parameter)
        if bucket and (mine.dtype != bucket[0].dtype or size + mine.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += mine.nbytes
    if bucket:
        yield bucket


class GradientSums:
    """The averages over `group` of the gradients of some parameters, in buckets of at most 25 MiB of one dtype.

    Buckets are started in one order on all ranks, each as soon as its gradients are there. A DTensor's local shard is
    averaged: the ranks of `group` must hold the same shard. A parameter without a gradient on this rank counts as zero,
    so that all ranks reduce the same buckets; one without a gradient on any rank stays without, so that no weight decay
    falls on what a model does not use.

    Args:
        group: if buckets are to start while a backward runs, no other one's messages: a rank whose bucket is complete
            later than its peers' has sent some of those before it.
        order: of the buckets, the same on all ranks; the last parameters first if None.

    Attributes:
        completed: numbers of the buckets in the order in which their gradients came.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, order: Sequence[int] | None = None
    ) -> None:
        self._group = group
        self._buckets = [*_buckets(parameter for parameter in parameters if parameter.requires_grad)]
        every = range(len(self._buckets))
        self._order = order if order is not None and sorted(order) == [*every] else every[::-1]
        self._missing = [{*map(id, bucket)} for bucket in self._buckets]
        self._place = {id(parameter): n for n, bucket in enumerate(self._buckets) for parameter in bucket}
        self._sums: dict[int, tuple[Tensor, Any]] = {}
        self._unused: list[tuple[nn.Parameter, Tensor]] = []
        self.completed: list[int] = []

    @property
    def started(self) -> int:
        """Buckets under way, or done."""
        return len(self._sums)

    @contextmanager
    def as_they_come(self) -> Iterator[None]:
        """Around a backward: start each bucket with the last of its gradients."""
        with ExitStack() as stack:
            for bucket in self._buckets:
                for parameter in bucket:
                    stack.callback(parameter.register_post_accumulate_grad_hook(self._came).remove)
            yield

    def _came(self, parameter: Tensor) -> None:
        place = self._place[id(parameter)]
        if place in self._sums:
            raise CreditError(
                f"a parameter of shape {tuple(parameter.shape)} got a second gradient in one backward, after the first "
                f"was sent",
                "a block that is run again in the backward",
                "take torch.utils.checkpoint with use_reentrant=False, or trainer.activation_checkpointing",
            )
        self._missing[place].discard(id(parameter))
        if not self._missing[place]:
            self.completed.append(place)
        while self.started < len(self._buckets) and not self._missing[self._order[self.started]]:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        number = self._order[self.started]
        bucket = self._buckets[number]
        unused = [n for n, parameter in enumerate(bucket) if parameter.grad is None]
        for n in unused:
            bucket[n].grad = torch.zeros_like(bucket[n])
        grads = [local(parameter.grad) for parameter in bucket if parameter.grad is not None]
        flags = _flags(len(bucket), tuple(unused), grads[0].dtype, grads[0].device)
        flat = torch.cat([*(grad.reshape(-1) for grad in grads), flags])
        *views, used = flat.split([*(grad.numel() for grad in grads), len(bucket)])
        for grad, view in zip(grads, views, strict=True):
            grad.data = view.view_as(grad)  # so that there is no second copy in memory, and none to be made at the end
        self._unused += [(bucket[n], used[n]) for n in unused]
        self._sums[number] = (flat, dist.all_reduce(flat, group=self._group, async_op=True))

    @torch.no_grad()
    def finish(self) -> None:
        """Start the buckets that are not under way, and wait for all: the gradients are averages from here on."""
        while self.started < len(self._buckets):
            self._start()
        for flat, work in self._sums.values():
            work.wait()
            flat.div_(self._group.size())
        for parameter, users in self._unused:  # which alone is worth that the host waits for a device
            if users == 0:
                parameter.grad = None

    def agreed_order(self) -> list[int]:
        """The order in which buckets were complete on the group's first rank, then the rest. For all ranks to call."""
        first = gather_objects(self.completed, self._group)[0]
        return [*first, *(number for number in self._order if number not in first)]


@constants
def _flags(number: int, unused: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One for each parameter of a bucket that has a gradient on this rank."""
    return torch.tensor([n not in unused for n in range(number)]).to(device, dtype)


def sync_domain_gradients(model: nn.Module, manager: DomainParallelManager | None) -> None:
    """Average gradients across the domain group, but those that FSDP2 has averaged over it."""
    manager = of_several(manager)
    group = manager.domain_group if manager is not None else None
    if group is not None:
        members = {*dist.get_process_group_ranks(group)}
        allreduce_grads_avg((p for p in model.parameters() if not _is_sharded_over(p, members)), group)


def _is_sharded_over(parameter: nn.Parameter, ranks: set[int]) -> bool:
    """True if these ranks hold different parts of it."""
    if not isinstance(parameter, DTensor):
        return False
    sharded = [n for n, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    mesh = parameter.device_mesh.mesh
    mine = [int(n) for n in (mesh == dist.get_rank()).nonzero()[0]]
    index = tuple(slice(None) if n in sharded else place for n, place in enumerate(mine))
    return len(ranks & {*mesh[index].flatten().tolist()}) > 1


def copies(tensor: Tensor) -> int:
    """How many ranks hold the same part of `tensor`: all of them, over those that it is sharded on."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(tensor, DTensor):
        return world
    sharded = [
        n
        for n, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if not placement.is_replicate()
    ]
    return world // prod(sharded)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply what this rank holds of the gradients, in place."""
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads and factor != 1:
        foreach_mul_(grads, factor)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients in place so that the norm of all of them, over all ranks and meshes, is at most `max_norm`.

    torch.nn.utils.clip_grad_norm_ refuses gradients on several meshes. Here every rank adds up the powers of what it
    holds, over the number of ranks that hold the same; one scalar is summed over the world.

    Args:
        parameters: plain, or DTensors on any mesh; already reduced over the ranks that average gradients.
        max_norm: None leaves the gradients as they are.
        norm_type: the order of the norm, inf among them.

    Returns:
        The norm before, as a scalar of the gradients' type, the same on all ranks.

    Raises:
        RuntimeError: on all ranks, as torch's, if it is not finite and `error_if_nonfinite`.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else [*parameters]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_copies: dict[int, list[Tensor]] = {}
    for grad in grads:
        by_copies.setdefault(copies(grad), []).append(local(grad))
    like = local(grads[0] if grads else parameters[0]) if parameters else torch.zeros(())
    norm = _norm(by_copies, float(norm_type), like.device)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"The total norm of order {norm_type} for gradients from `parameters` is non-finite")
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for mine in by_copies.values():
            foreach_mul_(mine, scale.to(mine[0].dtype))
    return norm.to(like.dtype)


def _norm(by_copies: dict[int, list[Tensor]], order: float, device: torch.device) -> Tensor:
    """The norm of all ranks' tensors, of which so many ranks hold the same, float64."""
    norms = {shared: torch.stack(foreach_norm(mine, order)).double() for shared, mine in by_copies.items()}
    if order == float("inf"):
        largest = [norm.max() for norm in norms.values()] or [torch.zeros((), dtype=torch.float64, device=device)]
        return all_max(torch.stack(largest).max())
    powers = torch.zeros((), dtype=torch.float64, device=device)
    for shared, norm in norms.items():
        powers += norm.pow(order).sum() / shared
    return all_sum(powers).pow(1 / order)
