"""From a config file to ranks on a mesh: start the process group, agree on the config, build the mesh."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import credit
from credit.config import Config
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError, LaunchError
from credit.launch.failure import naming_lost_peers
from credit.launch.ranks import Ranks, gpus_of_job
from credit.launch.rendezvous import join
from credit.layout import MeshShape, Seat, mesh_coords, mesh_shape
from credit.parallel.collectives import gather_objects, together
from credit.parallel.fsdp2 import gradient_mesh
from credit.parallel.mesh import build_device_mesh
from credit.status import claimed

START_TIMEOUT_S = 600.0
"""How long ranks wait for each other before the config says otherwise."""


SEEN_S = 30.0
"""A file system over a network shows a new file to other nodes after some time."""


@dataclass(frozen=True, eq=False)
class Job:
    """One rank's view of a running job.

    Attributes:
        seats: where every rank is.
        coords, shape: this rank's place on the mesh (dp, tp, domain), and the mesh's sizes.
        manager: of the domain group; of one rank where the domain is 1.
        gradient_mesh: the ranks over which gradients are averaged, dp x domain; None for one.
    """

    config: Config
    ranks: Ranks
    seats: list[Seat]
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

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks with other samples and the same rows and channels; None where there is one replica."""
        return self.mesh["dp"].get_group() if self.mesh is not None and self.shape.dp > 1 else None

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
    ours = ranks.world_size > 1 and not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _start_process_group(ranks, backend, timeout)
    with together("reading the config"):
        if error is not None:
            raise error
    assert config is not None
    with together("choosing the device"):
        device = choose_device(ranks.local_rank)
    seats = _agree(config, device)
    with together("building the mesh"):
        shape = checked_mesh_shape(config, ranks.world_size)
    with naming_lost_peers(ranks.rank, seats, shape, timeout.total_seconds()):
        mesh, _ = build_device_mesh(config.trainer.parallelism.model_dump(), device.type)
        flat = gradient_mesh(mesh)
        _bound_waits([mesh, flat], timeout)
        manager = DomainParallelManager.from_mesh(mesh)
        yield Job(config, ranks, seats, device, mesh, flat, shape, mesh_coords(shape, ranks.rank), manager)
    if ours:  # after a failure the process ends, and taking the groups down could wait for those who are gone
        dist.destroy_process_group()


@contextmanager
def sole_writer(job: Job) -> Iterator[None]:
    """Be the only job that writes into the run directory, which all ranks see.

    Raises:
        CreditError: on every rank, if another job has it, or some rank does not see what rank 0 writes there.
    """
    with ExitStack() as stack:
        with together("claiming the run directory"):
            if job.is_first:
                stack.enter_context(claimed(job.config.run))
        mark = job.config.run / f".seen-{gather_objects(uuid4().hex[:12])[0]}"
        with together("claiming the run directory"):
            if job.is_first:
                mark.touch()
        with together("looking at the run directory"):
            deadline = time.monotonic() + SEEN_S
            while not mark.exists():
                if time.monotonic() > deadline:
                    host = job.seats[job.ranks.rank].host
                    raise LaunchError(
                        f"rank {job.ranks.rank} on {host} does not see what rank 0 writes into {job.config.run}: set "
                        f"`run` to a directory on a file system that all nodes share"
                    )
                time.sleep(0.2)
        with together("claiming the run directory"):
            if job.is_first:
                mark.unlink()
        yield


def _start_process_group(ranks: Ranks, backend: str, timeout: timedelta) -> None:
    """Where `join` found the meeting place, or by what torchrun put into the environment."""
    meeting = ranks.rendezvous
    try:
        if meeting is None:
            dist.init_process_group(backend, timeout=timeout)
            return
        first = ranks.rank == 0
        world, fd = ranks.world_size, meeting.listening
        store = dist.TCPStore(meeting.address, meeting.port, world, first, timeout, master_listen_fd=fd)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=world, timeout=timeout)
    except dist.DistError as error:
        where = f"{meeting.address}:{meeting.port}" if meeting else "the address that torchrun gave"
        raise LaunchError(
            f"rank {ranks.rank} did not meet the others at {where}: {str(error).splitlines()[0]}"
        ) from error


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


def choose_device(local_rank: int) -> torch.device:
    """This rank's device: the only visible one, or that of its number on the node; the CPU where there is none.

    Raises:
        LaunchError: if the node has fewer devices than ranks, or the job has GPUs that torch cannot see.
    """
    if not torch.cuda.is_available():
        found = gpus_of_job()
        if found and (torch.version.cuda or torch.version.hip):
            raise LaunchError(
                f"{found}, but torch {torch.__version__} sees none on {socket.gethostname()}, and would compute on the "
                f"CPU: start a container with --nv (NVIDIA) or --rocm (AMD), or unset the variable if that is meant"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible <= local_rank:
        raise LaunchError(
            f"{socket.gethostname()} has {visible} GPUs, but rank {local_rank} of those on it asks for one of its own: "
            f"start at most {visible} ranks a node"
        )
    device = torch.device("cuda", 0 if visible == 1 else local_rank)
    torch.cuda.set_device(device)
    return device


def _agree(config: Config, device: torch.device) -> list[Seat]:
    """Every rank must run the same thing, on a device of its own; where they all are."""
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    seat = Seat(socket.gethostname(), name)
    facts = {"config": config.digest, "credit": credit.__version__, "torch": torch.__version__}
    everyone = gather_objects((seat, facts))
    seats = [one for one, _ in everyone]
    refuse_differences(seats, [facts for _, facts in everyone])
    refuse_shared_devices(seats)
    return [Seat(host, "cpu" if uuid == "cpu" else f"gpu {uuid[:8]}") for host, uuid in seats]


def refuse_differences(seats: Sequence[Seat], facts: Sequence[dict[str, str]]) -> None:
    """Raise a LaunchError that names what differs, with the ranks and hosts."""
    for name in facts[0]:
        values: dict[str, int] = {}
        for rank, one in enumerate(facts):
            values.setdefault(one[name], rank)
        if len(values) > 1:
            listed = ", ".join(f"{value} (rank {rank} on {seats[rank].host})" for value, rank in values.items())
            raise LaunchError(f"the ranks do not agree on {name}: {listed}. Start them with the same files")


def refuse_shared_devices(seats: Sequence[Seat]) -> None:
    """Raise a LaunchError if two ranks have one GPU; on the CPU they may share."""
    taken: dict[Seat, int] = {}
    for rank, seat in enumerate(seats):
        other = taken.setdefault(seat, rank)
        if other != rank and seat.device != "cpu":
            raise LaunchError(
                f"ranks {other} and {rank} are both on GPU {seat.device} of {seat.host}: start one rank a GPU, and let "
                f"every rank see all GPUs of its node, or its own alone (srun --gpus-per-task=1)"
            )


def _bound_waits(meshes: list[DeviceMesh | None], timeout: timedelta) -> None:
    """Give every subgroup the world's timeout; torch would let them wait half an hour."""
    for mesh in meshes:
        for group in mesh.get_all_groups() if mesh is not None else ():
            dist.distributed_c10d._set_pg_timeout(timeout, group)
