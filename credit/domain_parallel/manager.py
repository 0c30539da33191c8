"""The process groups of domain parallelism: who holds the rows north and south of mine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_manager: DomainParallelManager | None = None


class DomainParallelError(RuntimeError):
    """An operation has no exact sharded form here. Names the module, the reason and the remedy."""


@dataclass
class Traffic:
    """What this rank has put on the wire for domain parallelism since `reset`.

    Attributes:
        messages: point-to-point messages sent (halo rows and their gradients).
        bytes: payload of those messages.
        collectives: collective calls (norm statistics, settling of lengths).
        collective_bytes: what this rank gave to them.
    """

    messages: int = 0
    bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0

    def reset(self) -> None:
        self.messages = self.bytes = self.collectives = self.collective_bytes = 0

    def count(self, given: Tensor) -> None:
        """Take a collective call into account."""
        self.collectives += 1
        self.collective_bytes += given.nbytes


class DomainParallelManager:
    """Process groups and coordinates of one rank on the (dp, domain) layout.

    Domain groups are consecutive ranks. A job with tensor parallelism builds its manager from the mesh
    (`from_mesh`), so that the layout has one source.

    Args:
        world_size: total number of ranks.
        domain_parallel_size: ranks that share one field.
        shard_dim: the axis that is cut; -2 is latitude in (..., latitude, longitude).

    Raises:
        ValueError: if `world_size` is not a multiple of `domain_parallel_size`.
        RuntimeError: if several ranks are asked for and torch.distributed is not initialised.
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
            mesh = init_device_mesh(_device_type(), shape, mesh_dim_names=("dp", "domain"))
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
        self.traffic = Traffic()

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
            return dist.get_rank() if dist.is_initialized() else 0
        return dist.get_global_rank(self._domain_group, domain_rank)

    @property
    def message_device(self) -> torch.device:
        """Where small control messages of the domain group live: the CPU if the group can do that."""
        if "gloo" in str(dist.get_backend_config(self._domain_group)):
            return torch.device("cpu")
        return torch.device(_device_type(), torch.accelerator.current_device_index())

    def all_reduce(self, values: Tensor) -> None:
        """Sum over the domain ranks, in place."""
        dist.all_reduce(values, group=self._domain_group)
        self.traffic.count(values)

    def all_gather(self, values: Tensor) -> Tensor:
        """(domain rank, ...): the `values` of every rank."""
        everyone = values.new_empty(self.domain_parallel_size, *values.shape)
        dist.all_gather(list(everyone.unbind()), values, group=self._domain_group)
        self.traffic.count(values)
        return everyone

    def start_messages(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> list[dist.Work]:
        """Begin to send to, and to receive from, these domain ranks. Empty tensors are not sent."""
        group = self._domain_group
        sends = {peer: tensor for peer, tensor in outgoing.items() if tensor.numel()}
        ops = [dist.P2POp(dist.isend, tensor, self.global_rank(peer), group) for peer, tensor in sends.items()]
        for peer, tensor in incoming.items():
            if tensor.numel():
                ops.append(dist.P2POp(dist.irecv, tensor, self.global_rank(peer), group))
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for tensor in sends.values())
        return dist.batch_isend_irecv(ops) if ops else []

    # A process group cannot be copied or stored: a copied model keeps its manager, and a model that is
    # loaded again in another process takes the manager of that process.
    def __deepcopy__(self, memo: dict) -> DomainParallelManager:
        return self

    def __reduce__(self):
        return get_domain_parallel_manager, ()

    def __repr__(self) -> str:
        return (
            f"DomainParallelManager(dp {self._dp_rank}/{self.data_parallel_size}, "
            f"domain {self._domain_rank}/{self.domain_parallel_size}, shard_dim={self.shard_dim})"
        )


def _device_type() -> str:
    backend = dist.get_backend()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if backend == "gloo" or accelerator is None else accelerator.type


def initialize_domain_parallel(
    world_size: int, domain_parallel_size: int, shard_dim: int = -2
) -> DomainParallelManager:
    """Create the manager that layers use when none is given, and return it."""
    return set_domain_parallel_manager(DomainParallelManager(world_size, domain_parallel_size, shard_dim))


def set_domain_parallel_manager(manager: DomainParallelManager) -> DomainParallelManager:
    """Make `manager` (built from a mesh, say) the one that layers use when none is given."""
    global _manager
    _manager = manager
    return manager


def get_domain_parallel_manager() -> DomainParallelManager | None:
    """The manager set last by `initialize_domain_parallel`, or None."""
    return _manager
