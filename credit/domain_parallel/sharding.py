"""Cutting fields into latitude slabs, and putting them together again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.lengths import global_length
from credit.domain_parallel.manager import DomainParallelManager, get_domain_parallel_manager
from credit.domain_parallel.partition import Everything, Partition, PartitionError, make_plan


def _manager_or_global(manager: DomainParallelManager | None) -> DomainParallelManager | None:
    manager = manager or get_domain_parallel_manager()
    return manager if manager is not None and manager.domain_world_size > 1 else None


def shard_tensor(x: Tensor, dim: int = -2, manager: DomainParallelManager | None = None) -> Tensor:
    """This rank's rows of a tensor that every domain rank holds whole.

    Args:
        x: the global tensor.
        dim: the axis to cut; its length need not divide, see `Partition`.
        manager: defaults to the global one; without any, or with one domain rank, `x` is returned.

    Raises:
        PartitionError: on every rank, if there are fewer rows than domain ranks.
    """
    manager = _manager_or_global(manager)
    if manager is None:
        return x
    if x.shape[dim] < manager.domain_world_size:
        raise PartitionError(f"cannot cut {x.shape[dim]} rows over {manager.domain_world_size} domain ranks")
    rows = Partition(x.shape[dim], manager.domain_world_size).range(manager.domain_rank)
    return x.narrow(dim, rows.start, len(rows)).contiguous()


def gather_tensor(x: Tensor, dim: int = -2, manager: DomainParallelManager | None = None) -> Tensor:
    """The global tensor, on every domain rank, from the shards. The inverse of `shard_tensor`.

    Differentiable: the gradient of a shard is the sum of what every rank's copy of it received.
    """
    manager = _manager_or_global(manager)
    if manager is None:
        return x
    length = global_length(x.shape[dim], manager, "gather_tensor")
    parts = manager.domain_world_size
    plan = make_plan(Everything(), Partition(length, parts), manager.domain_rank, Partition(parts, parts))
    return exchange(x, plan, dim, manager)


def shard_batch(
    batch: dict[str, Any],
    spatial_dims_5d: int = -2,
    spatial_dims_4d: int = -2,
    manager: DomainParallelManager | None = None,
) -> dict[str, Any]:
    """A batch with its fields cut: 5-D (batch, channel, time, latitude, longitude) and 4-D tensors.

    Everything else (ids, times, scalars, tensors of three axes and fewer) is passed on as it is.
    """
    dims = {5: spatial_dims_5d, 4: spatial_dims_4d}
    return {
        name: shard_tensor(value, dims[value.ndim], manager)
        if isinstance(value, Tensor) and value.ndim in dims
        else value
        for name, value in batch.items()
    }
