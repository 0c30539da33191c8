"""Which address and interface every process group uses: decided here, for all launchers, and tried out before.

gloo would take what the host's own name resolves to, which on a default Debian is a loopback address, and NCCL guesses.
Here the first rank of every host offers its addresses, that of the next host tries them, and what it reaches is used,
once all others have tried it too. No torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from credit.errors import LaunchError
from credit.launch.ranks import is_loopback

VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""What gloo and NCCL read, with what stands before a name that is whole."""
GLOO = next(iter(VARIABLES))
TRY_S = 3.0
"""How long an address of another host may take to answer."""
_NEW, _DONE, _DUMP = 20, 3, 22  # RTM_NEWADDR, NLMSG_DONE, RTM_GETADDR
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ADDRESS, _LOCAL = 1, 2  # IFA_ADDRESS, IFA_LOCAL


class Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def set_timeout(self, timeout: timedelta) -> None: ...


class _Until:
    """A store of which all waits together end at a deadline."""

    def __init__(self, store: Store, deadline: float) -> None:
        self._store, self._deadline, self.set = store, deadline, store.set

    def get(self, key: str) -> str:
        self._store.set_timeout(timedelta(seconds=max(self._deadline - time.monotonic(), 1.0)))
        return self._store.get(key).decode()


class Face(NamedTuple):
    """An address of this host, and the interface that it is of."""

    address: str
    interface: str


def faces() -> list[Face]:
    """The addresses of this host, as the kernel tells them: IPv4 first; none that are valid on one link only.

    Raises:
        OSError: if the kernel does not.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.settimeout(5)
        kernel.send(struct.pack("=IHHIIB7x", 24, _DUMP, _REQUEST_DUMP, 1, 0, socket.AF_UNSPEC))
        return list(_faces(kernel))


def _faces(kernel: socket.socket) -> Iterator[Face]:
    while True:
        data = kernel.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _DONE:
                return
            if kind == _NEW:
                family, _, _, scope, index = struct.unpack_from("=BBBBI", data, 16)
                parts = dict(_attributes(data[24:length]))
                if scope != 253:  # RT_SCOPE_LINK
                    raw = parts.get(_LOCAL) or parts[_ADDRESS]
                    yield Face(socket.inet_ntop(family, raw), socket.if_indextoname(index))
            data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = struct.unpack_from("=HH", data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


def addresses(towards: str | None = None) -> list[str]:
    """Of this host, those first by which others are likely to reach it: one an interface, that which gloo would take.

    Args:
        towards: an address of the host of rank 0, where this is another.
    """
    chosen = [name for name in os.environ.get(GLOO, "").split(",") if name]
    first: dict[str, str] = {}
    for address, interface in faces():
        if not chosen or interface in chosen:
            first.setdefault(interface, address)
    liked = [_route(towards) if towards else "", *resolve([socket.gethostname()], TRY_S), _route("192.0.2.1")]
    rank = {address: number for number, address in reversed(list(enumerate(liked)))}
    return sorted(first.values(), key=lambda one: (is_loopback(one), rank.get(one, len(liked))))


def _route(towards: str) -> str:
    """The address from which packets would go there, or ""."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return probe.getsockname()[0]
    return ""


def resolve(names: Sequence[str], seconds: float) -> list[str]:
    """The addresses of hosts, by their names or without what comes after the first dot; none of names unknown here."""
    found: dict[str, None] = {}

    def ask() -> None:
        for name in dict.fromkeys([*names, *(one.split(".")[0] for one in names if not one[0].isdigit())]):
            with suppress(OSError):
                found.update((str(one[4][0]), None) for one in socket.getaddrinfo(name, 9, type=socket.SOCK_STREAM))

    asking = threading.Thread(target=ask, daemon=True)  # a server of names that does not answer takes half a minute
    asking.start()
    asking.join(max(seconds, 0.1))
    return list(found)


class Agreed(NamedTuple):
    """What process groups use on this host, and all hosts in words."""

    interface: str
    said: str


def agree(shared: Store, rank: int, size: int, deadline: float, towards: str | None = None) -> Agreed:
    """Find out, with all ranks, at which address each host is reached.

    Args:
        shared: by all ranks, and used for nothing else.
        deadline: on the monotonic clock.
        towards: an address of rank 0's host.

    Raises:
        LaunchError: on every rank, if a host is not reached at any address, or has not the interface that is named by
            GLOO_SOCKET_IFNAME.
        RuntimeError: of the store, if a rank does not come.
    """
    store, host = _Until(shared, deadline), socket.gethostname()
    store.set(f"net/host/{rank}", host)
    if rank == 0:
        hosts = [_heard_of(store, one) for one in range(size)]
        store.set("net/table", json.dumps({"hosts": hosts, "token": secrets.token_hex(16)}))
    table = json.loads(store.get("net/table"))
    first = {name: table["hosts"].index(name) for name in table["hosts"]}
    names = list(first)
    if len(names) == 1:
        return Agreed(_of_one_host(), "")
    number = names.index(host)
    if first[host] != rank:
        found = json.loads(store.get("net/found"))
    else:
        with _answering(f"{table['token']} {number}") as port:
            found = _try_out(store, rank == 0, names, number, table["token"], port, towards)
    problems = [problem for one in found["problems"] for problem in one]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise LaunchError(f"{'; '.join(problems[:3])}{more}. {ADVICE}")
    said = [f"{name} at {address} ({face})" for name, (address, face) in zip(names, found["chosen"], strict=True)]
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return Agreed(found["chosen"][number][1], f"{', '.join(said[:4])}{more}")


def _heard_of(store: _Until, rank: int) -> str:
    try:
        return store.get(f"net/host/{rank}")
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} came, and was not heard of again in time: it ended (see its own message, or the node's log), "
            f"or stands still. CREDIT_START_TIMEOUT is the time for the whole start, in seconds"
        ) from error


ADVICE = (
    "Is there a firewall between them, or should GLOO_SOCKET_IFNAME name another interface (`credit doctor` lists "
    "those of a node)?"
)


def _of_one_host() -> str:
    return next((interface for address, interface in faces() if is_loopback(address)), "lo")


def _try_out(
    store: _Until, first: bool, names: list[str], number: int, token: str, port: int, towards: str | None
) -> dict[str, Any]:
    """Offer this host's addresses; say at which of its own the next host is reached; then try what all have got."""

    def share(what: str, mine: Any, key: int = number) -> list[Any]:
        """What the first ranks of all hosts say, by host."""
        store.set(f"net/{what}/{key}", json.dumps(mine))
        if first:
            store.set(f"net/{what}", json.dumps([json.loads(store.get(f"net/{what}/{n}")) for n in range(len(names))]))
        return json.loads(store.get(f"net/{what}"))

    offers = share("offers", (port, {one: interface for one in addresses(towards) for interface in _interfaces(one)}))
    following = (number + 1) % len(names)
    there, offered = offers[following]
    reached = next((one for one in offered if _reaches(one, there, f"{token} {following}")), None)
    chosen = share("chosen", (reached, offered.get(reached)), following)
    problems = []
    if reached is None:
        listed = ", ".join(f"{one} ({interface})" for one, interface in offered.items()) or "no address"
        named = f" of {GLOO}={os.environ[GLOO]}" if os.environ.get(GLOO) else ""
        problems = [f"{names[number]} does not reach {names[following]}, which has {listed}{named}"]
    elif all(address for address, _ in chosen):
        others = [n for n in range(len(names)) if n not in (number, following)]
        with ThreadPoolExecutor(32) as pool:
            tried = pool.map(lambda n: _reaches(chosen[n][0], offers[n][0], f"{token} {n}"), others)
            lost = [n for n, good in zip(others, tried, strict=True) if not good]
        problems = [f"{names[number]} does not reach {names[n]} at {chosen[n][0]} ({chosen[n][1]})" for n in lost]
    found = {"chosen": chosen, "problems": share("problems", problems)}
    if first:
        store.set("net/found", json.dumps(found))
    return found


def _interfaces(address: str) -> list[str]:
    return [interface for one, interface in faces() if one == address][:1]


def _reaches(address: str, port: int, token: str) -> bool:
    """Whether the host that answers there is the one that is meant."""
    nonce = secrets.token_bytes(32)
    with suppress(OSError), socket.create_connection((address, port), timeout=TRY_S) as there:
        there.sendall(nonce)
        return hmac.compare_digest(there.recv(32, socket.MSG_WAITALL), _answer(token, nonce))
    return False


def _answer(token: str, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce, hashlib.sha256)


@contextmanager
def _answering(token: str) -> Iterator[int]:
    """Answer who tries an address of this host; the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(TRY_S)
            with suppress(OSError):
                self.request.sendall(_answer(token, self.request.recv(32, socket.MSG_WAITALL)))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 1024
        address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

        def server_bind(self) -> None:
            if self.address_family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    with Server(("", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
