"""Cutting fields into latitude slabs, and putting them together again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from credit.domain_parallel.lengths import global_length
from credit.domain_parallel.manager import DomainParallelManager, get_domain_parallel_manager, of_several
from credit.domain_parallel.partition import Partition, PartitionError
from credit.domain_parallel.reshard import reshard, whole
from credit.domain_parallel.slab import Slab


def _manager_or_global(manager: DomainParallelManager | None) -> DomainParallelManager | None:
    return of_several(manager or get_domain_parallel_manager())


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
    length = global_length(x.shape[dim], manager.group, "gather_tensor")
    return whole(Slab(x, dim % x.ndim, Partition(length, manager.domain_world_size), manager.group))


def reshard_tensor(x: Tensor, dim: int, new_dim: int, manager: DomainParallelManager | None = None) -> Tensor:
    """The shard of the same global tensor cut along another axis: the all-to-all transpose. Differentiable.

    For transforms along the sharded axis, as the Legendre transform along latitudes:

        columns = reshard_tensor(x, -2, -1)                   # every rank: all latitudes of some longitudes
        y = reshard_tensor(transform(columns), -1, -2)

    Args:
        x: this rank's shard, cut along `dim`.
        dim, new_dim: the axis that is cut, and the one to be cut; the latter whole in `x`.
        manager: defaults to the global one; without any, or with one domain rank, `x` is returned.

    Raises:
        PartitionError: on every rank, if `new_dim` is shorter than the number of ranks.
    """
    manager = _manager_or_global(manager)
    if manager is None:
        return x
    dim, new_dim, parts = dim % x.ndim, new_dim % x.ndim, manager.domain_world_size
    if x.shape[new_dim] < parts:
        raise PartitionError(f"cannot cut axis {new_dim} of length {x.shape[new_dim]} over {parts} domain ranks")
    length = global_length(x.shape[dim], manager.group, "reshard_tensor")
    return reshard(Slab(x, dim, Partition(length, parts), manager.group), new_dim).local


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
