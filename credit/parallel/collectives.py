"""Agreement and reductions across ranks. Everything works, as a no-op, without torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager
from credit.domain_parallel.partition import PartitionError
from credit.errors import CreditError

USER_ERRORS = (CreditError, DomainParallelError, PartitionError)
"""What a user can mend: printed as a paragraph, without a traceback."""

BUCKET_BYTES = 25 * 2**20


@contextmanager
def together(what: str) -> Iterator[None]:
    """Run the body on every rank, and let it fail on all ranks if it fails on one.

    Without this, the rank that meets a missing file stops while its peers wait for it.

    Raises:
        CreditError: on every rank, with what each failing rank had to say.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = gather_objects(None if error is None else _say(error))
    if any(said):
        share_failure(said, what, error)


def share_failure(said: list[str | None], what: str, error: Exception | None) -> None:
    """Raise one error for all ranks from what each said; a rank's own unexpected error keeps its traceback."""
    if error is not None and not isinstance(error, USER_ERRORS):
        raise error
    messages: dict[str, list[int]] = {}
    for rank, message in enumerate(said):
        if message is not None:
            messages.setdefault(message, []).append(rank)
    if len(messages) == 1 and None not in said:
        raise CreditError(next(iter(messages))) from None
    lines = "; ".join(f"on rank {', '.join(map(str, ranks))}: {message}" for message, ranks in messages.items())
    raise CreditError(f"{what} failed {lines}") from None


def _say(error: Exception) -> str:
    return str(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Return once every rank has come here. `together` does not wait before its body, only after it."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is on any."""
    if not dist.is_initialized():
        return flag
    return bool(all_sum(torch.tensor(int(flag), device=device)))


def local(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def allreduce_grads_avg(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Average gradients over `group`, in place, in buckets of at most 25 MiB of one dtype.

    A DTensor's local shard is averaged: the ranks of `group` must hold the same shard. A parameter without a
    gradient on this rank counts as zero, so that all ranks reduce the same buckets.
    """
    if group is None:
        return
    grads = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(local(parameter.grad))
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size + grad.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket


def sync_domain_gradients(model: nn.Module, manager: DomainParallelManager | None) -> None:
    """Average gradients across the domain group, for models that neither DDP nor FSDP2 reduces."""
    allreduce_grads_avg(model.parameters(), manager.domain_group if manager is not None else None)
