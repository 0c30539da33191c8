"""From a config file to ranks on a mesh: start the process group, agree on the config, build the mesh."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

import credit
from credit.boundary import CAUGHT, leave_tracebacks_in
from credit.caches import compiled_code, own_caches
from credit.config import Config
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.torch_private import bound_default_group
from credit.errors import LaunchError
from credit.launch import network
from credit.launch.failure import naming_lost_peers
from credit.launch.precision import computing_as
from credit.launch.ranks import LEFT_OVER, Ranks, gpus_of_job, hides_gpus, number_of, number_on_node
from credit.launch.rendezvous import NotMetError, join, start_deadline
from credit.layout import MeshShape, Seat, joined_mesh_shape, mesh_coords
from credit.parallel.collectives import gather_objects, together
from credit.parallel.mesh import build_device_mesh, gradient_mesh
from credit.status import claimed

SEEN_S = 30.0
"""A file system over a network shows a new file to other nodes after some time."""
SKEW_S = 30.0
"""By how much the clocks of hosts may differ before it is said."""
END_S = 30.0
"""How long taking the process groups down may take: a run that is done has not failed by that."""
_starts = count()


@dataclass(frozen=True, eq=False)
class Job:
    """One rank's view of a running job.

    Attributes:
        seats: where every rank is.
        coords, shape: this rank's place on the mesh (dp, tp, domain), and the mesh's sizes.
        manager: of the domain group; of one rank where the domain is 1.
        gradient_mesh: the ranks over which gradients are averaged, dp x domain; None for one.
        clock_ahead: seconds that this host's clock is ahead of rank 0's, where they differ by much.
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
    clock_ahead: float = 0.0

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
    compiled_code()
    own_caches()
    deadline = start_deadline()
    ranks = join(deadline=deadline)
    config: Config | None = None
    error: BaseException | None = None
    try:
        config = load()
    except CAUGHT as caught:
        error = caught
    timeout = timedelta(seconds=config.trainer.timeout) if config else _left(deadline)
    ours = ranks.world_size > 1 and not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _start_process_group(ranks, backend, deadline, timeout)
    elif dist.is_initialized():  # by others, who may wait half an hour
        bound_default_group(timeout)
    with together("reading the config"):
        if error is not None:
            raise error
    assert config is not None
    leave_tracebacks_in(config.run)
    with together("choosing the device"):
        device = choose_device(ranks.local_rank)
    seats = _agree(config, device)
    ahead = _clocks(seats)
    with together("building the mesh"):
        shape = checked_mesh_shape(config, ranks.world_size)
    with naming_lost_peers(ranks.rank, seats, shape, config.trainer.timeout), computing_as(config.trainer):
        with _new_groups_bounded_by(timeout):
            parallelism = config.trainer.parallelism.model_dump()
            mesh, _ = build_device_mesh(parallelism, device.type, config.trainer.timeout)
            flat = gradient_mesh(mesh)
        manager = DomainParallelManager.from_mesh(mesh)
        coords, mine = mesh_coords(shape, ranks.rank), ahead[ranks.rank]
        yield Job(config, ranks, seats, device, mesh, flat, shape, coords, manager, mine)
    if ours:  # after a failure the process ends, and taking the groups down could wait for those who are gone
        _end_process_group()


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


def _start_process_group(ranks: Ranks, backend: str, deadline: float, timeout: timedelta) -> None:
    """Where `join` found the meeting place, or by what torchrun put into the environment; over a network that works.

    Torch's own start is bounded by `timeout` alone, and begins once all ranks have come and all hosts reach each other.

    Raises:
        LaunchError: if the ranks do not meet before the deadline.
    """
    meeting = ranks.rendezvous
    towards = meeting.address if meeting else os.environ.get("MASTER_ADDR", "")
    try:
        store = dist.PrefixStore(f"credit/{next(_starts)}", _store(ranks, _left(deadline)))
        agreed = network.agree(store, ranks.rank, ranks.world_size, deadline, towards)
        if agreed.said and ranks.rank == 0:
            print(f"credit: network: {agreed.said}", file=sys.stderr, flush=True)
        for variable, whole in network.VARIABLES.items():
            os.environ[variable] = os.environ.get(variable) or whole + agreed.interface
        store.set_timeout(timeout)
        dist.init_process_group(backend, timeout=timeout, world_size=ranks.world_size, rank=ranks.rank, store=store)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotMetError(
            f"rank {ranks.rank} on {socket.gethostname()} did not meet the others: {reason}. Did one end (see its own "
            f"message, or the node's log), and may all nodes talk to each other?",
            speaks=ranks.local_rank == 0,  # rank 0 may not be there to say so
        ) from error


def _store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    meeting = ranks.rendezvous
    if meeting is None:
        if not os.environ.get("MASTER_ADDR"):
            raise LaunchError(f"the environment has no MASTER_ADDR, which goes with RANK and WORLD_SIZE: {LEFT_OVER}")
        number_of(os.environ, "MASTER_PORT")
        return next(iter(rendezvous("env://", timeout=timeout)))[0]
    first, fd = ranks.rank == 0, meeting.listening
    return dist.TCPStore(meeting.address, meeting.port, ranks.world_size, first, timeout, master_listen_fd=fd)


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 1.0))


@contextmanager
def _new_groups_bounded_by(timeout: timedelta) -> Iterator[None]:
    """Torch would let the ranks of a new subgroup wait half an hour for each other.

    From the beginning: gloo's sends and receives go by what a group was made with, whatever is set afterwards.
    """
    module = dist.distributed_c10d
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, timeout)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _end_process_group() -> None:
    """Take the groups down once all ranks are here: others may still be asking the store, which ends with rank 0.

    In a thread: a backend may wait for what does not come.
    """

    def take_down() -> None:
        with suppress(RuntimeError):  # of a rank that has failed by itself
            gather_objects(None)
        dist.destroy_process_group()

    end = threading.Thread(target=take_down, daemon=True)
    end.start()
    end.join(END_S)


def checked_mesh_shape(config: Config, world_size: int) -> MeshShape:
    """The mesh of `world_size` ranks.

    Raises:
        CreditError: if the config cannot be laid out on them.
    """
    try:
        return joined_mesh_shape(config.trainer.parallelism.model_dump(), world_size)
    except ValueError as error:
        raise LaunchError(str(error)) from None


def choose_device(local_rank: int) -> torch.device:
    """This rank's device: the only visible one, or that of its number on the node; the CPU where none is to be seen.

    Raises:
        LaunchError: if the node has fewer devices than ranks, or the job has GPUs that torch cannot see.
    """
    if hides_gpus() or not torch.cuda.is_available():
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
    name = "cpu" if device.type == "cpu" else gpu_name(torch.cuda.get_device_properties(device), device.index)
    seat = Seat(socket.gethostname(), name)
    facts = {"config": config.digest, "credit": credit.__version__, "torch": torch.__version__}
    everyone = gather_objects((seat, facts))
    seats = [one for one, _ in everyone]
    refuse_differences(seats, [facts for _, facts in everyone])
    refuse_shared_devices(seats)
    return [Seat(host, "cpu" if name == "cpu" else f"gpu {name[:12]}") for host, name in seats]


def gpu_name(properties: Any, seen: int, env: Mapping[str, str] = os.environ) -> str:
    """What tells a GPU, or a part of one, from the others of its node, in whatever process.

    Args:
        properties: as torch has them. The uuid of a virtual one may be all zero, and parts of one GPU may share it.
        seen: its number in this process.
    """
    place = number_on_node(seen, env)
    if place.startswith("MIG-"):
        return place
    if {*str(properties.uuid)} - {*"0-"}:
        return str(properties.uuid)
    bus = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    return "{:x}:{:02x}:{:02x}".format(*bus) if any(bus) else f"number {place}"


def _clocks(seats: Sequence[Seat]) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, which counts; 0 where it is about the same."""
    gather_objects(None)  # so that all look at the same time
    times = gather_objects(time.time())
    ahead = [one - times[0] if abs(one - times[0]) > SKEW_S else 0.0 for one in times]
    wrong = {seats[rank].host: seconds for rank, seconds in enumerate(ahead) if seconds}
    if wrong and (not dist.is_initialized() or dist.get_rank() == 0):
        listed = ", ".join(f"{host} by {seconds:+.0f} s" for host, seconds in list(wrong.items())[:4])
        print(
            f"credit: warning: clocks differ from that of {seats[0].host}, which counts: {listed}. Have them set",
            file=sys.stderr,
            flush=True,
        )
    return ahead


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
