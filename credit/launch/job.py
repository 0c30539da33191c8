"""From a config file to ranks on a mesh: start the process group, agree on the config, build the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import credit
from credit.config import Config
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError, LaunchError
from credit.launch.ranks import Ranks
from credit.launch.rendezvous import join
from credit.parallel.collectives import gather_objects, together
from credit.parallel.fsdp2 import gradient_mesh
from credit.parallel.mesh import MeshShape, build_device_mesh, mesh_coords, mesh_shape

START_TIMEOUT_S = 600.0
"""How long ranks wait for each other before the config says otherwise."""


@dataclass(frozen=True, eq=False)
class Job:
    """One rank's view of a running job.

    Attributes:
        coords, shape: this rank's place on the mesh (dp, tp, domain), and the mesh's sizes.
        manager: of the domain group; of one rank where the domain is 1.
        gradient_mesh: the ranks over which gradients are averaged, dp x domain; None for one.
    """

    config: Config
    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh | None
    gradient_mesh: DeviceMesh | None
    shape: MeshShape
    coords: MeshShape
    manager: DomainParallelManager

    @property
    def is_first(self) -> bool:
        """True on the one rank that prints and writes logs."""
        return self.ranks.rank == 0

    def say(self, text: str) -> None:
        if self.is_first:
            print(text, flush=True)

    def rows(self, latitudes: int) -> range:
        """The latitude rows of this rank, of that many."""
        return Partition(latitudes, self.shape.domain).range(self.coords.domain)


@contextmanager
def start_job(load: Callable[[], Config]) -> Iterator[Job]:
    """Join the process group, agree with all ranks on the config, and build the mesh.

    Args:
        load: reads the config. If it fails on one rank, all are told.

    Raises:
        CreditError: on every rank alike.
    """
    ranks = join()
    config, error = None, None
    try:
        config = load()
    except ConfigError as caught:
        error = caught
    timeout = timedelta(seconds=config.trainer.timeout if config else START_TIMEOUT_S)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    ours = ranks.world_size > 1 and not dist.is_initialized()
    if ours:
        _start_process_group(ranks, "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout)
    try:
        with together("reading the config"):
            if error is not None:
                raise error
        assert config is not None
        _refuse_differences(config)
        with together("building the mesh"):
            shape = checked_mesh_shape(config, ranks.world_size)
        mesh, _ = build_device_mesh(config.trainer.parallelism.model_dump(), device.type)
        flat = gradient_mesh(mesh)
        _bound_waits([mesh, flat], timeout)
        manager = DomainParallelManager.from_mesh(mesh)
        yield Job(config, ranks, device, mesh, flat, shape, mesh_coords(shape, ranks.rank), manager)
    finally:
        if ours:
            dist.destroy_process_group()


def _start_process_group(ranks: Ranks, backend: str, timeout: timedelta) -> None:
    """Where `join` found the meeting place, or by what torchrun put into the environment."""
    meeting = ranks.rendezvous
    if meeting is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.TCPStore(
        meeting.address,
        meeting.port,
        ranks.world_size,
        is_master=ranks.rank == 0,
        timeout=timeout,
        master_listen_fd=meeting.listening,
    )
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def checked_mesh_shape(config: Config, world_size: int) -> MeshShape:
    """The mesh of `world_size` ranks.

    Raises:
        CreditError: if the config cannot be laid out on them.
    """
    parallelism = config.trainer.parallelism
    try:
        shape = mesh_shape(parallelism.model_dump(), world_size)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if shape.dp > 1 and parallelism.data == "none":
        raise LaunchError(
            f"{world_size} ranks make {shape.dp} replicas, which trainer.parallelism.data: none would train apart "
            f"from each other: set it to ddp or fsdp2, or start {world_size // shape.dp} ranks"
        )
    return shape


def _refuse_differences(config: Config) -> None:
    """Every rank must run the same thing."""
    facts = {"config": config.digest, "credit": credit.__version__, "torch": torch.__version__}
    everyone = gather_objects(facts)
    for name in facts:
        values = {str(one[name]): rank for rank, one in reversed(list(enumerate(everyone)))}
        if len(values) > 1:
            listed = ", ".join(f"{value} (rank {rank})" for value, rank in values.items())
            raise LaunchError(f"the ranks do not agree on {name}: {listed}. Start them with the same files")


def _bound_waits(meshes: list[DeviceMesh | None], timeout: timedelta) -> None:
    """Give every subgroup the world's timeout; torch would let them wait half an hour."""
    for mesh in meshes:
        for group in mesh.get_all_groups() if mesh is not None else ():
            dist.distributed_c10d._set_pg_timeout(timeout, group)
