"""Where the ranks meet before there is a process group: rank 0 hears all, numbers them, and tells each its place.

The first process opens a port and everybody learns which: through MPI where MPI started the ranks; otherwise the others
look for it on the first host, on a few ports that follow from the job's name, and a process there that does not
know the job is passed by. One message a rank each way, so thousands of ranks take seconds. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from credit.errors import LaunchError
from credit.launch.ranks import Claim, Ranks, Rendezvous, choose, is_loopback

START_TIMEOUT_S = 300.0
"""How long the ranks wait for each other to come up; `CREDIT_START_TIMEOUT` changes it."""
PORTS = 16
"""Ports that the ranks agree to look at."""


class Arrival(NamedTuple):
    """What a process says of itself when it comes."""

    rank: int
    size: int
    host: str
    pid: int


class Place(NamedTuple):
    """What it is told: its number, and on which node it is which."""

    rank: int
    local_rank: int
    node: int


MPI_ADVICE = (
    "Use the mpiexec of that library, or srun --mpi=pmi2 or --mpi=pmix as it needs, or start without MPI: "
    "CREDIT_LAUNCHER=slurm, or torchrun. A container can be given the host's library: containers/README.md"
)


def join(env: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place among all; returns when every rank has come, or raises on all that have.

    Raises:
        LaunchError: if the launchers contradict each other, ranks are missing, or there are too many.
    """
    claim = choose(env)
    timeout = float(env.get("CREDIT_START_TIMEOUT", START_TIMEOUT_S))
    if claim.source in ("torchrun", "single"):
        return Ranks(claim.rank, claim.size, claim.local_rank or 0, claim.source)
    if claim.source == "mpi":
        return _join_by_mpi(claim, env)
    if claim.size == 1:
        return Ranks(0, 1, 0, claim.source)
    if claim.first_host is None:
        raise LaunchError(
            f"{claim.said_by} started {claim.size} processes, but nothing says on which host the first is: export "
            f"CREDIT_FIRST_HOST=$(head -n 1 $PBS_NODEFILE) in the job script, or set CREDIT_LAUNCHER=mpi"
        )
    deadline = time.monotonic() + timeout
    mine = Arrival(claim.rank, claim.size, socket.gethostname(), os.getpid())
    answer = _host(claim, mine, deadline) if claim.rank == 0 else _visit(claim, mine, deadline)
    if "error" in answer:
        raise LaunchError(answer["error"])
    place = Place(*answer["place"])
    address = claim.first_host if claim.rank else socket.gethostname()
    meeting = Rendezvous(address, answer["port"], answer.get("listening"))
    return Ranks(place.rank, claim.size, place.local_rank, claim.source, meeting)


def number(arrivals: list[Arrival]) -> list[Place]:
    """Places of processes, in their order: nodes in the order of their first rank, ranks consecutive on a node.

    Whatever the launcher's distribution, groups along the inner dimensions of the mesh then stay on a node.

    Raises:
        LaunchError: if the processes disagree about how many they are, or two say the same rank.
    """
    size = len(arrivals)
    others = [one for one in arrivals if one.size != size]
    if others:
        raise LaunchError(
            f"the ranks do not agree on the world: {size} came, but rank {others[0].rank} on {others[0].host} says "
            f"{others[0].size}. Start all with one srun or mpiexec"
        )
    by_rank: dict[int, Arrival] = {}
    for one in arrivals:
        twin = by_rank.setdefault(one.rank, one)
        if twin is not one:
            raise LaunchError(
                f"two processes say that they are rank {one.rank}, on {twin.host} and {one.host}: was it started twice?"
            )
    hosts: dict[str, list[int]] = {}
    for rank in sorted(by_rank):
        hosts.setdefault(by_rank[rank].host, []).append(rank)
    order = [(rank, local, node) for node, ranks in enumerate(hosts.values()) for local, rank in enumerate(ranks)]
    places = {rank: Place(new, local, node) for new, (rank, local, node) in enumerate(order)}
    return [places[one.rank] for one in arrivals]


def listen(backlog: int) -> socket.socket:
    """A socket on a free port, that a child process or torch's store may take over."""
    return socket.create_server(("", 0), backlog=backlog)


def _token(claim: Claim) -> str:
    return hashlib.blake2b(f"credit {claim.source} {claim.job}".encode(), digest_size=8).hexdigest()


def _ports(token: str) -> list[int]:
    """Below the range from which systems hand out ports by themselves."""
    first = int(token, 16) % 8000
    return [20000 + (first + 997 * i) % 12000 for i in range(PORTS)]


def _host(claim: Claim, mine: Arrival, deadline: float) -> dict[str, Any]:
    token = _token(claim)
    with _bind(token, claim.size) as server:
        visitors, arrivals = _receive(server, token, mine, deadline)
    try:
        if len(arrivals) < claim.size:
            raise LaunchError(_missing(claim, arrivals))
        places = number(arrivals)
    except LaunchError as error:
        for visitor in visitors:
            _send(visitor, {"error": str(error)})
        raise
    meeting = listen(claim.size)
    port = meeting.getsockname()[1]
    for visitor, place in zip(visitors, places[1:], strict=True):
        _send(visitor, {"place": place, "port": port})
    return {"place": places[0], "port": port, "listening": meeting.detach()}


def _bind(token: str, size: int) -> socket.socket:
    for port in _ports(token):
        with suppress(OSError):
            return socket.create_server(("", port), backlog=min(size, 4096))
    raise LaunchError(f"none of the ports {', '.join(map(str, _ports(token)))} is free on {socket.gethostname()}")


def _receive(
    server: socket.socket, token: str, mine: Arrival, deadline: float
) -> tuple[list[socket.socket], list[Arrival]]:
    """Everybody who comes before the deadline, until all are there."""
    visitors: dict[Arrival, socket.socket] = {}  # who comes a second time has given up on the first
    while len(visitors) + 1 < mine.size:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            visitor, _ = server.accept()
        except TimeoutError:
            break
        try:
            visitor.settimeout(1)
            said = _hear(visitor.makefile("rb"))
            if said.get("token") != token:
                raise ValueError("another job")
            _send(visitor, {"token": token})
            visitors[Arrival(*said["arrival"])] = visitor
        except (OSError, ValueError):
            visitor.close()
    return list(visitors.values()), [mine, *visitors]


def _missing(claim: Claim, arrivals: list[Arrival]) -> str:
    here = {one.rank for one in arrivals}
    gone = [rank for rank in range(claim.size) if rank not in here]
    hosts = ", ".join(sorted({one.host for one in arrivals}))
    listed = ", ".join(map(str, gone[:8])) + (" ..." if len(gone) > 8 else "")
    return (
        f"{len(gone)} of {claim.size} ranks did not come in time: {listed}; those on {hosts} did. Is a node down, or "
        f"does the container or the file system not start there? CREDIT_START_TIMEOUT is the time they have, in seconds"
    )


def _visit(claim: Claim, mine: Arrival, deadline: float) -> dict[str, Any]:
    token, host = _token(claim), claim.first_host
    assert host is not None
    pause = 0.1
    while True:
        for port in _ports(token):
            # The first host gives up at its deadline, and its word should arrive here.
            if time.monotonic() > deadline + 5:
                local = f"; here {host} is a loopback address" if is_loopback(host) else ""
                raise LaunchError(
                    f"rank {claim.rank} on {mine.host} did not find rank 0 on {host} in time{local}. Did it start, and "
                    f"may nodes talk to each other on ports {min(_ports(token))} to {max(_ports(token))}?"
                )
            with suppress(OSError, ValueError), socket.create_connection((host, port), timeout=5) as hub:
                lines = hub.makefile("rb")
                _send(hub, {"token": token, "arrival": mine})
                if _hear(lines).get("token") != token:
                    continue
                hub.settimeout(max(deadline - time.monotonic(), 0) + 5)
                return _hear(lines)
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # whoever left learns nothing; that rank's own error counts
        to.sendall(json.dumps(message).encode() + b"\n")


def _hear(lines: BinaryIO) -> dict[str, Any]:
    """The next line of a connection, of which one buffered reader is kept: two lines may arrive at once."""
    line = lines.readline()
    if not line.endswith(b"\n"):
        raise ValueError("closed")
    return json.loads(line)


def _start_mpi(claim: Claim) -> Any:
    """mpi4py's MPI, initialised, once it is known to be that of the launcher."""
    try:
        import mpi4py

        # Initialising may abort the process: what can be told before is told before.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{claim.said_by} started this process, but MPI cannot be loaded: {error}. Install mpi4py with the MPI of "
            f"this mpiexec, or start the ranks with srun or torchrun"
        ) from None
    library = _library(MPI)
    if claim.said_by.startswith("mpiexec") and ("Open MPI" in claim.said_by) != ("Open MPI" in library):
        raise LaunchError(
            f"{claim.said_by} started this process, but mpi4py loads {library}, which does not understand it: every "
            f"rank would be alone. {MPI_ADVICE}"
        )
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI


def _library(mpi: Any) -> str:
    return " ".join(mpi.Get_library_version().split("\n")[0].strip("\0").split())


def _join_by_mpi(claim: Claim, env: Mapping[str, str]) -> Ranks:
    """Ask MPI itself: who is there, and who shares my memory."""
    MPI = _start_mpi(claim)
    world = MPI.COMM_WORLD
    expected = max(claim.size, int(env.get("SLURM_STEP_NUM_TASKS", "1")) if claim.said_by == "CREDIT_LAUNCHER" else 0)
    if world.size != expected and expected > 0:
        raise LaunchError(
            f"MPI says that this is rank {world.rank} of {world.size}, but {claim.said_by} started {expected}: the "
            f"library that mpi4py loads ({_library(MPI)}) is not the launcher's: all would be alone. {MPI_ADVICE}"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    memory = node.bcast(world.rank)  # the first rank of those that share it
    several = world.allreduce(memory, op=MPI.MAX) > 0
    arrivals = world.gather(Arrival(world.rank, world.size, f"{socket.gethostname()}#{memory}", os.getpid()))
    answers: list[dict[str, Any]] | None = None
    listening = None
    if arrivals is not None:
        try:
            address, meeting = routable_address(several), listen(world.size)
            answers = [{"place": place, "at": (address, meeting.getsockname()[1])} for place in number(arrivals)]
            listening = meeting.detach()
        except LaunchError as error:
            answers = [{"error": str(error)}] * world.size
    answer = world.scatter(answers)
    if "error" in answer:
        raise LaunchError(answer["error"])
    place = answer["place"]
    return Ranks(
        place.rank,
        world.size,
        place.local_rank,
        "mpi",
        Rendezvous(address=answer["at"][0], port=answer["at"][1], listening=listening),
    )


def routable_address(several_nodes: bool) -> str:
    """An address of this host that the other nodes reach.

    Raises:
        LaunchError: if there are other nodes, and only loopback addresses.
    """
    if not several_nodes:
        return "127.0.0.1"
    name = socket.gethostname()
    if not is_loopback(name):
        with suppress(OSError):
            return socket.gethostbyname(name)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which interface leads out (an address for documentation)
        return probe.getsockname()[0]
    raise LaunchError(
        f"{name} has a loopback address only, which other nodes cannot reach: its name must resolve to another"
    )
