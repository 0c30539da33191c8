"""Where the ranks meet before there is a process group: rank 0 hears all, numbers them, and tells each its place.

The first process opens a port and everybody learns which: through MPI where MPI started the ranks; otherwise the others
look for it on the first host, on a few ports that follow from the secret of this start. Whoever does not know the
secret is sent away, or passed by: see `credit.launch.secret` and `credit.launch.greeting`. One message a rank each
way, so thousands of ranks take seconds. No torch.
"""

from __future__ import annotations

import hashlib
import os
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from credit.errors import HeardByFewError, LaunchError
from credit.launch import secret as common
from credit.launch.greeting import GREETING_S, Visit, Visitor
from credit.launch.network import addresses, resolve
from credit.launch.ranks import Claim, Ranks, Rendezvous, choose, is_loopback, number_of

START_TIMEOUT_S = 300.0
"""How long the ranks wait for each other to come up; `CREDIT_START_TIMEOUT` changes it."""
PORTS = 16
"""Ports that the ranks agree to look at."""
STRANGERS = 1024
"""Visitors heard at a time that have not proved themselves; the one that has taken longest makes room for the next."""
GRACE_S = 5.0
"""Rank 0 gives up at the deadline, and its word should arrive at the others."""


class NotMetError(HeardByFewError):
    """A rank did not find the others; the first rank of each node says so."""


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


@dataclass(frozen=True)
class _Meeting:
    """What a rank knows of the place before it goes there.

    Attributes:
        hosts: names and addresses at which rank 0 may be reached.
        secrets: those that may be the ranks' common one, by now.
        port: where MPI has said it.
        hint: where the secret is to be found, for messages.
    """

    hosts: list[str]
    secrets: Callable[[], list[bytes]]
    port: int | None = None
    hint: str = ""


_END_AT = """
import os, select, signal, sys
seconds, process, said = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    print(*filter(None, [said]), file=sys.stderr, flush=True)
    os.kill(int(process), signal.SIGKILL)
"""
MPI_ADVICE = (
    "Use the mpiexec of that library, or srun --mpi=pmi2 or --mpi=pmix as it needs, or start without MPI: "
    "CREDIT_LAUNCHER=slurm, or torchrun. A container can be given the host's library: containers/README.md"
)


def start_deadline(env: Mapping[str, str] = os.environ) -> float:
    """By when, on the monotonic clock, the ranks must have met, after all waits together.

    Raises:
        LaunchError: if CREDIT_START_TIMEOUT is no time.
    """
    text = env.get("CREDIT_START_TIMEOUT", str(START_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise LaunchError(f"CREDIT_START_TIMEOUT is {text!r}, and must be a number of seconds, such as 300")
    return time.monotonic() + seconds


def join(env: Mapping[str, str] = os.environ, deadline: float | None = None) -> Ranks:
    """This process's place among all; returns when every rank has come, or raises on all that have.

    Args:
        deadline: on the monotonic clock; by CREDIT_START_TIMEOUT from now by default.

    Raises:
        LaunchError: if the launchers contradict each other, ranks are missing, or there are too many.
    """
    claim = choose(env)
    deadline = start_deadline(env) if deadline is None else deadline
    if claim.source in ("torchrun", "single"):
        return Ranks(claim.rank, claim.size, claim.local_rank or 0, claim.source)
    if claim.source == "mpi":
        return _join_by_mpi(claim, env, deadline)
    if claim.size == 1:
        return Ranks(0, 1, 0, claim.source)
    if claim.first_host is None:
        raise LaunchError(
            f"{claim.said_by} started {claim.size} processes, but nothing says on which host the first is: export "
            f"CREDIT_FIRST_HOST=$(head -n 1 $PBS_NODEFILE) in the job script, or set CREDIT_LAUNCHER=mpi"
        )
    mine = Arrival(claim.rank, claim.size, socket.gethostname(), os.getpid())
    known, files = common.given(env), common.places(claim)
    seen = f"The ranks' secret lies in {' or '.join(map(str, files))}, one of which all have to see"
    hint = "" if known else f". {seen}: if not, {common.ADVICE}"
    if claim.rank == 0:
        with ExitStack() as stack:
            secret = known or stack.enter_context(common.left(files))
            return _host(claim, mine, secret, stack.enter_context(_bind(secret, claim.size)), deadline, hint)
    look = _Meeting([claim.first_host], lambda: [known] if known else common.found(files), hint=hint)
    return _visit(claim, mine, look, deadline)


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


def listen(backlog: int, port: int = 0) -> socket.socket:
    """A socket on a free port, over IPv4 and IPv6, that a child process or torch's store may take over.

    Raises:
        OSError: if the port is taken.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _ports(secret: bytes) -> list[int]:
    """Below the range from which systems hand out ports by themselves; nobody else can tell which."""
    first = int.from_bytes(hashlib.blake2b(secret, digest_size=8, person=b"credit ports").digest(), "big")
    return [20000 + (first + 997 * i) % 12000 for i in range(PORTS)]


def _bind(secret: bytes, size: int) -> socket.socket:
    for port in _ports(secret):
        with suppress(OSError):
            return listen(min(size + STRANGERS, 4096), port)
    raise LaunchError(f"none of the ports {', '.join(map(str, _ports(secret)))} is free on {socket.gethostname()}")


def _host(claim: Claim, mine: Arrival, secret: bytes, server: socket.socket, deadline: float, hint: str = "") -> Ranks:
    with ExitStack() as stack:
        visitors = _receive(server, secret, mine, deadline)
        for visitor in visitors.values():
            stack.enter_context(visitor.connection)
        try:
            arrivals = [mine, *visitors]
            if len(arrivals) < mine.size:
                raise LaunchError(_missing(mine.size, arrivals, hint))
            places = number(arrivals)
            meeting = listen(mine.size)
        except LaunchError as error:
            for visitor in visitors.values():
                with suppress(OSError):  # whoever left learns nothing; that rank's own error counts
                    visitor.tell({"error": str(error)})
            raise
        port = meeting.getsockname()[1]
        for visitor, place in zip(visitors.values(), places[1:], strict=True):
            with suppress(OSError):
                visitor.tell({"place": place, "port": port})
    here = Rendezvous("127.0.0.1", port, meeting.detach())
    return Ranks(places[0].rank, mine.size, places[0].local_rank, claim.source, here)


def _receive(server: socket.socket, secret: bytes, mine: Arrival, deadline: float) -> dict[Arrival, Visitor]:
    """Everybody who comes before the deadline, until all are there."""
    ranks: dict[Arrival, Visitor] = {}
    with _many_files(mine.size), selectors.DefaultSelector() as ready:
        server.setblocking(False)
        ready.register(server, selectors.EVENT_READ)
        strangers: dict[Visitor, None] = {}  # in the order in which they came
        while len(ranks) + 1 < mine.size and time.monotonic() < deadline:
            for key, _ in ready.select(min(max(deadline - time.monotonic(), 0), 0.5)):
                if key.data is None:
                    _admit(server, secret, ready, strangers)
                elif key.data in strangers and (arrival := _hear(key.data, ready, strangers)) is not None:
                    if arrival in ranks:  # who comes a second time has given up on the first
                        ranks[arrival].connection.close()
                    ranks[arrival] = key.data
            for visitor in [one for one in strangers if one.deadline < time.monotonic()]:
                _send_away(visitor, ready, strangers)
        for visitor in list(strangers):
            _send_away(visitor, ready, strangers)
    return ranks


def _admit(server: socket.socket, secret: bytes, ready: selectors.BaseSelector, strangers: dict[Visitor, None]) -> None:
    if len(strangers) >= STRANGERS:
        _send_away(next(iter(strangers)), ready, strangers)
    try:
        connection, _ = server.accept()
    except OSError:  # it has left, or there are too many open files
        if strangers:
            _send_away(next(iter(strangers)), ready, strangers)
        return
    try:
        visitor = Visitor(connection, secret)
    except OSError:
        connection.close()
        return
    strangers[visitor] = None
    ready.register(connection, selectors.EVENT_READ, visitor)


def _hear(visitor: Visitor, ready: selectors.BaseSelector, strangers: dict[Visitor, None]) -> Arrival | None:
    """Who it is, once it has proved that it belongs here."""
    try:
        said = visitor.hear()
        if said is None:
            return None
        rank, size, host, pid = said
        arrival = Arrival(int(rank), int(size), str(host), int(pid))
        visitor.tell({})  # it may stop looking
    except (OSError, ValueError, TypeError):
        _send_away(visitor, ready, strangers)
        return None
    ready.unregister(visitor.connection)
    del strangers[visitor]
    return arrival


def _send_away(visitor: Visitor, ready: selectors.BaseSelector, strangers: dict[Visitor, None]) -> None:
    ready.unregister(visitor.connection)
    visitor.connection.close()
    del strangers[visitor]


@contextmanager
def _many_files(size: int) -> Iterator[None]:
    """Room for a connection of each rank and of many strangers, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = size + STRANGERS + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _missing(size: int, arrivals: list[Arrival], hint: str) -> str:
    here = {one.rank for one in arrivals}
    gone = [rank for rank in range(size) if rank not in here]
    hosts = ", ".join(sorted({one.host.partition("#")[0] for one in arrivals}))
    listed = ", ".join(map(str, gone[:8])) + (" ..." if len(gone) > 8 else "")
    return (
        f"{len(gone)} of {size} ranks did not come in time: {listed}; those on {hosts} did. Is a node down, does the "
        f"container or the file system not start there, or may nodes not talk to each other? CREDIT_START_TIMEOUT is "
        f"the time they have, in seconds{hint}"
    )


def _visit(claim: Claim, mine: Arrival, meeting: _Meeting, deadline: float) -> Ranks:
    pause, end = 0.1, deadline + GRACE_S
    known: list[bytes] = []
    while time.monotonic() < end:
        known = meeting.secrets() or known
        hosts = [*resolve(meeting.hosts, end - time.monotonic()), "localhost"] if known else []
        for secret, host in product(known, hosts):
            for port in _ports(secret) if meeting.port is None else [meeting.port]:
                if time.monotonic() > end:
                    break
                with suppress(OSError, ValueError), socket.create_connection((host, port), timeout=GREETING_S) as hub:
                    answer = Visit(hub, secret, mine).hear(end)
                    if "error" in answer:
                        raise LaunchError(answer["error"])
                    place = Place(*answer["place"])
                    there = Rendezvous(hub.getpeername()[0], answer["port"])
                    return Ranks(place.rank, mine.size, place.local_rank, claim.source, there)
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)
    raise NotMetError(_lost(mine, meeting, known), speaks=claim.local_rank in (0, None))


def _lost(mine: Arrival, meeting: _Meeting, known: list[bytes]) -> str:
    """Why a rank has not found rank 0, of which it knew these secrets, as far as it can tell."""
    name = meeting.hosts[0]
    begin = f"rank {mine.rank} on {mine.host.partition('#')[0]} did not find rank 0 on {name} in time"
    if not known:
        return f"{begin}: it left no secret. Did it start? {meeting.hint.removeprefix('. ')}"
    if not resolve(meeting.hosts, GREETING_S):
        return f"{begin}: the name does not resolve here. Put it into /etc/hosts or the DNS of this node"
    local = f"; here {name} is a loopback address" if is_loopback(name) else ""
    ports = _ports(known[0]) if meeting.port is None else [meeting.port]
    where = f"ports {min(ports)} to {max(ports)}" if len(ports) > 1 else f"port {ports[0]}"
    return f"{begin}{local}. Did it start, and may nodes talk to each other on {where}?"


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


def _join_by_mpi(claim: Claim, env: Mapping[str, str], deadline: float) -> Ranks:
    """Ask MPI itself who is there; see `_met_in_mpi`."""
    with _ended_at(deadline + GRACE_S, claim):
        return _met_in_mpi(claim, env, deadline)


@contextmanager
def _ended_at(deadline: float, claim: Claim) -> Iterator[None]:
    """End this process if the body takes longer: MPI waits for all ranks without a bound, and holds Python's lock."""
    said = (
        f"credit: error: rank {claim.rank} on {socket.gethostname()}: MPI waits for ranks that do not come. Did they "
        f"end or stop before, or is a node down? CREDIT_START_TIMEOUT is the time they have, in seconds"
    )
    words = [str(deadline - time.monotonic()), str(os.getpid()), said if claim.local_rank in (0, None) else ""]
    with subprocess.Popen([sys.executable, "-ISc", _END_AT, *words], stdin=subprocess.PIPE):  # until its input ends
        yield


def _met_in_mpi(claim: Claim, env: Mapping[str, str], deadline: float) -> Ranks:
    """Who is there, and who shares my memory; and let MPI tell all where to meet."""
    MPI = _start_mpi(claim)
    world = MPI.COMM_WORLD
    expected = max(claim.size, number_of(env, "SLURM_STEP_NUM_TASKS", "1") if claim.said_by == "CREDIT_LAUNCHER" else 0)
    if world.size != expected and expected > 0:
        raise LaunchError(
            f"MPI says that this is rank {world.rank} of {world.size}, but {claim.said_by} started {expected}: the "
            f"library that mpi4py loads ({_library(MPI)}) is not the launcher's: all would be alone. {MPI_ADVICE}"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    memory = node.bcast(world.rank)  # the first rank of those that share it
    several = world.allreduce(memory, op=MPI.MAX) > 0
    mine = Arrival(world.rank, world.size, f"{socket.gethostname()}#{memory}", os.getpid())
    if world.rank == 0:
        with listen(min(world.size + STRANGERS, 4096)) as server:
            secret = common.drawn()
            world.bcast((secret, addresses() if several else ["127.0.0.1"], server.getsockname()[1]))
            return _host(claim, mine, secret, server, deadline)
    secret, hosts, port = world.bcast(None)
    return _visit(claim, mine, _Meeting(hosts, lambda: [secret], port), deadline)
