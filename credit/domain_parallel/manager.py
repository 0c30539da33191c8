"""The process groups of domain parallelism: who holds the rows north and south of mine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from credit.domain_parallel.groups import Alone, ProcessRanks, RankGroup, Traffic, device_type
from credit.domain_parallel.warm import warm

_manager: DomainParallelManager | None = None
_thread = threading.local()
"""Has a `manager` of its own while the thread is a rank."""


class DomainParallelError(RuntimeError):
    """An operation has no exact sharded form here. Names the module, the reason and the remedy."""


class DomainParallelManager:
    """Groups and coordinates of one rank on the (dp, domain) layout.

    Domain groups are consecutive ranks. A job with tensor parallelism builds its manager from the mesh
    (`from_mesh`), so that the layout has one source.

    Args:
        world_size: total number of ranks.
        domain_parallel_size: ranks that share one field.
        shard_dim: the axis that is cut; -2 is latitude in (..., latitude, longitude).

    Raises:
        ValueError: if `world_size` is not a multiple of `domain_parallel_size`.
        RuntimeError: if several ranks are asked for and torch.distributed is not initialised.
        DomainParallelError: if the ranks of a group do not meet on their devices.
    """

    def __init__(self, world_size: int, domain_parallel_size: int, shard_dim: int = -2) -> None:
        if domain_parallel_size < 1 or world_size % domain_parallel_size:
            raise ValueError(
                f"world_size {world_size} is not a multiple of domain_parallel_size {domain_parallel_size}"
            )
        mesh = None
        if world_size > 1:
            if not dist.is_initialized():
                raise RuntimeError(
                    f"a DomainParallelManager for {world_size} ranks needs torch.distributed: "
                    f"start under torchrun and call torch.distributed.init_process_group first"
                )
            shape = (world_size // domain_parallel_size, domain_parallel_size)
            mesh = init_device_mesh(device_type(), shape, mesh_dim_names=("dp", "domain"))
            for name in ("dp", "domain"):
                problem = warm(name, mesh.get_group(name), mesh.device_type)
                if problem is not None:
                    raise DomainParallelError(problem)
        self._bind(mesh, world_size, domain_parallel_size, shard_dim)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | None, shard_dim: int = -2) -> DomainParallelManager:
        """The manager of a mesh whose dimensions are named among "dp", "tp" and "domain"."""
        self = cls.__new__(cls)
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh is not None else {}
        self._bind(mesh, mesh.size() if mesh is not None else 1, sizes.get("domain", 1), shard_dim)
        return self

    def _bind(self, mesh: DeviceMesh | None, world_size: int, domain_size: int, shard_dim: int) -> None:
        names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
        self.world_size = world_size
        self.domain_parallel_size = domain_size
        self.shard_dim = shard_dim
        self.data_parallel_size = mesh["dp"].size() if mesh is not None and "dp" in names else 1
        self._domain_rank = mesh.get_local_rank("domain") if mesh is not None and "domain" in names else 0
        self._dp_rank = mesh.get_local_rank("dp") if mesh is not None and "dp" in names else 0
        self._domain_group_idx = dist.get_rank() // domain_size if mesh is not None else 0
        self._domain_group = mesh.get_group("domain") if mesh is not None and "domain" in names else None
        self._dp_group = mesh.get_group("dp") if mesh is not None and "dp" in names else None
        self.group: RankGroup = ProcessRanks(self._domain_group) if self._domain_group is not None else Alone()

    @classmethod
    def of_group(cls, group: RankGroup, shard_dim: int = -2) -> DomainParallelManager:
        """The manager of one domain group, whatever its ranks are: threads, say."""
        self = cls.__new__(cls)
        self._bind(None, group.size, group.size, shard_dim)
        self.group, self._domain_rank = group, group.rank
        return self

    @property
    def traffic(self) -> Traffic:
        """What this rank has given to its domain group."""
        return self.group.traffic

    @property
    def domain_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one field: halo exchange and norm statistics run over it."""
        return self._domain_group

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same rows of different samples."""
        return self._dp_group

    @property
    def domain_rank(self) -> int:
        """0 holds the first rows (the north pole when latitudes run southwards)."""
        return self._domain_rank

    @property
    def domain_world_size(self) -> int:
        return self.domain_parallel_size

    @property
    def dp_rank(self) -> int:
        return self._dp_rank

    @property
    def dp_world_size(self) -> int:
        return self.data_parallel_size

    @property
    def is_first_domain_rank(self) -> bool:
        return self._domain_rank == 0

    @property
    def is_last_domain_rank(self) -> bool:
        return self._domain_rank == self.domain_parallel_size - 1

    def neighbor_ranks(self) -> tuple[int | None, int | None]:
        """Global ranks that hold the rows before and after this rank's; None past a pole."""
        before = None if self.is_first_domain_rank else self.global_rank(self._domain_rank - 1)
        after = None if self.is_last_domain_rank else self.global_rank(self._domain_rank + 1)
        return before, after

    def global_rank(self, domain_rank: int) -> int:
        """Global rank of a member of this rank's domain group."""
        if self._domain_group is None:
            return dist.get_rank() if self.group.size == 1 and dist.is_initialized() else domain_rank
        return dist.get_global_rank(self._domain_group, domain_rank)

    # A group cannot be copied or stored: a copied model keeps its manager, and a model that is
    # loaded again in another process takes the manager of that process.
    def __deepcopy__(self, memo: dict[str, Any]) -> DomainParallelManager:
        return self

    def __reduce__(self) -> Any:
        return get_domain_parallel_manager, ()

    def __repr__(self) -> str:
        return (
            f"DomainParallelManager(dp {self._dp_rank}/{self.data_parallel_size}, "
            f"domain {self._domain_rank}/{self.domain_parallel_size}, shard_dim={self.shard_dim})"
        )


def initialize_domain_parallel(
    world_size: int, domain_parallel_size: int, shard_dim: int = -2
) -> DomainParallelManager:
    """Create the manager that layers use when none is given, and return it."""
    return set_domain_parallel_manager(DomainParallelManager(world_size, domain_parallel_size, shard_dim))


def set_domain_parallel_manager(manager: DomainParallelManager) -> DomainParallelManager:
    """Make `manager` (built from a mesh, say) the one that layers use when none is given."""
    global _manager
    if hasattr(_thread, "manager"):
        _thread.manager = manager
    else:
        _manager = manager
    return manager


@contextmanager
def as_rank(manager: DomainParallelManager) -> Iterator[None]:
    """While it lasts, this thread is a rank by itself, with that manager."""
    _thread.manager = manager
    try:
        yield
    finally:
        del _thread.manager


def get_domain_parallel_manager() -> DomainParallelManager | None:
    """The manager set last by `initialize_domain_parallel`, or None."""
    return getattr(_thread, "manager", _manager)


def of_several(manager: Any) -> DomainParallelManager | None:
    """The manager of a domain of more than one rank; None where nothing is cut.

    Programs for one device may hand in any object with `domain_parallel_size`, as long as that is 1.

    Raises:
        DomainParallelError: if it is more, and the object has no group of ranks.
    """
    if manager is None or manager.domain_parallel_size == 1:
        return None
    if not isinstance(manager, DomainParallelManager):
        raise DomainParallelError(
            f"a {type(manager).__name__} of domain_parallel_size {manager.domain_parallel_size} has no ranks to "
            f"exchange rows with: give the DomainParallelManager that initialize_domain_parallel returns, or "
            f"DomainParallelManager.from_mesh(mesh)"
        )
    return manager
