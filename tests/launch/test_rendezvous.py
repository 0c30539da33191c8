"""The ranks meet whoever else calls: strangers at rank 0's port, and strangers on the ports where it is looked for.

All on loopback, in threads, without torch. A stranger here knows the ports, which follow from the secret, but not the
secret: more than one on a real network can know.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from credit.errors import LaunchError
from credit.launch import greeting, rendezvous, secret
from credit.launch.greeting import LONGEST_ARRIVAL, NONCE, Visit, Visitor
from credit.launch.ranks import Claim, Ranks, choose
from credit.launch.rendezvous import Arrival, join

SIZE = 3
SECRET = "0123456789abcdef of a test"
HANG_S = 60
"""Far above what a start takes, and far below what one would take that hears strangers one after the other."""
MORE_BYTES = 50e6


def environment(rank: int, **more: str) -> dict[str, str]:
    given = {"JOB_ID": "7", "STEP_ID": "0", "STEP_NODELIST": "localhost", "STEP_NUM_TASKS": SIZE, "PROCID": rank}
    slurm = {f"SLURM_{name}": str(value) for name, value in given.items()}
    return {**slurm, "SLURM_STEP_TASKS_PER_NODE": str(SIZE), "CREDIT_START_TIMEOUT": str(HANG_S), **more}


def start(rank: int, into: dict[int, Ranks | LaunchError], **more: str) -> threading.Thread:
    def run() -> None:
        try:
            into[rank] = join(environment(rank, **more))
        except LaunchError as error:
            into[rank] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def all_met(into: dict[int, Ranks | LaunchError], threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(HANG_S + 20)
    places = {rank: place.rank if isinstance(place, Ranks) else str(place) for rank, place in into.items()}
    assert places == {rank: rank for rank in range(SIZE)}
    os.close(into[0].rendezvous.listening)


def port() -> int:
    return rendezvous._ports(SECRET.encode())[0]


def call() -> socket.socket:
    """Rank 0's port, once it is there."""
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port()), timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def recorded() -> tuple[bytes, bytes]:
    """What a true visitor and a true host said, under the same secret, when they met before."""
    ours, theirs = socket.socketpair()
    visitor = Visitor(theirs, SECRET.encode())
    said: list[bytes] = []

    def answer() -> None:
        theirs.setblocking(True)
        said.append(theirs.recv(4096, socket.MSG_PEEK))
        assert visitor.hear() is not None
        visitor.tell({})
        visitor.tell({"place": [1, 1, 0], "port": 1})

    host = threading.Thread(target=answer)
    host.start()
    theirs_say = []
    real = ours.recv

    class Tap:
        def __getattr__(self, name: str):
            return getattr(ours, name)

        def recv(self, size: int) -> bytes:
            theirs_say.append(real(size))
            return theirs_say[-1]

    visit = Visit(Tap(), SECRET.encode(), Arrival(1, SIZE, socket.gethostname(), 1))  # type: ignore[arg-type]
    visit.hear(time.monotonic() + 5)
    host.join()
    ours.close(), theirs.close()
    return said[0], b"".join(theirs_say)


def framed(payload: bytes, length: int | None = None) -> bytes:
    return os.urandom(NONCE + 32) + (len(payload) if length is None else length).to_bytes(4, "big") + payload


def forged(stranger: socket.socket, key: bytes) -> None:
    with suppress(OSError, ValueError):
        Visit(stranger, key, Arrival(1, SIZE, "elsewhere", 1))


def pour(stranger: socket.socket, piece: bytes, pause: float = 0.0) -> None:
    """For as long as it is listened to."""
    with suppress(OSError):
        while True:
            stranger.sendall(piece)
            time.sleep(pause)


JOB = hashlib.blake2b(b"credit slurm 0.7.0.0", digest_size=8).hexdigest()
STRANGERS: dict[str, Callable[[socket.socket, bytes], None]] = {
    "idle": lambda stranger, _: None,
    "gone at once": lambda stranger, _: stranger.close(),
    "garbage": lambda stranger, _: stranger.sendall(os.urandom(1500)),
    "a line of JSON": lambda stranger, _: stranger.sendall(b"[]\n"),
    "the job's number": lambda stranger, _: stranger.sendall(
        json.dumps({"token": JOB, "arrival": [1, SIZE, "x", 1]}).encode() + b"\n"
    ),
    "drip": lambda stranger, _: pour(stranger, b"[", 0.05),
    "endless": lambda stranger, _: pour(stranger, b"[" * (1 << 20)),
    "nested": lambda stranger, _: stranger.sendall(framed(b"[" * LONGEST_ARRIVAL)),
    "wrong size": lambda stranger, _: stranger.sendall(framed(b"x" * 100, length=0xFFFFFFFF)),
    "replayed": lambda stranger, said: stranger.sendall(said),
    "forged": lambda stranger, _: forged(stranger, b"another secret of some length"),
}


@contextmanager
def many_files() -> Iterator[None]:
    """Visitors and visited are one process here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this system does not allow so many open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def most_memory() -> int:
    """Bytes of this process at its largest, since `reset_memory`."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def reset_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize(("kind", "number"), [*((kind, 8) for kind in STRANGERS), ("idle", 1000), ("garbage", 1000)])
def test_strangers_do_not_hold_up_the_ranks(kind, number, recorded) -> None:
    into: dict[int, Ranks | LaunchError] = {}
    reset_memory()
    before = most_memory()
    with many_files(), ExitStack() as stack:
        threads = [start(0, into, CREDIT_SECRET=SECRET)]
        for _ in range(number):
            stranger = stack.enter_context(call())
            if number > 100:  # a thread each would cost more than what is tested
                with suppress(OSError):
                    STRANGERS[kind](stranger, recorded[0])
            else:
                threading.Thread(target=STRANGERS[kind], args=(stranger, recorded[0]), daemon=True).start()
        threads += [start(rank, into, CREDIT_SECRET=SECRET) for rank in range(1, SIZE)]
        all_met(into, threads)
    assert most_memory() - before < MORE_BYTES


def sit(kind: str, said: bytes, server: socket.socket) -> None:
    """On a port where rank 0 might be."""
    while True:
        try:
            visitor, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=HOSTS[kind], args=(visitor, said), daemon=True).start()


def forge_host(visitor: socket.socket) -> None:
    with suppress(OSError, ValueError):
        host = Visitor(visitor, b"another secret of some length")
        visitor.setblocking(True)
        visitor.recv(4096)
        host.tell({})
        host.tell({"place": [1, 1, 0], "port": 1})


HOSTS: dict[str, Callable[[socket.socket, bytes], None]] = {
    "silent": lambda visitor, _: time.sleep(HANG_S),
    "drip": lambda visitor, _: pour(visitor, b"[", 0.05),
    "endless": lambda visitor, _: pour(visitor, b"\xff" * (1 << 20)),
    "replayed": lambda visitor, said: visitor.sendall(said),
    "forged": lambda visitor, _: forge_host(visitor),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_a_stranger_on_a_port_of_rank_0_is_passed_by(kind, recorded, monkeypatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 1.0)
    into: dict[int, Ranks | LaunchError] = {}
    with ExitStack() as stack:
        for taken in rendezvous._ports(SECRET.encode())[:2]:
            server = stack.enter_context(rendezvous.listen(16, taken))
            stack.callback(server.shutdown, socket.SHUT_RDWR)  # which wakes the thread
            threading.Thread(target=sit, args=(kind, recorded[1], server), daemon=True).start()
        all_met(into, [start(rank, into, CREDIT_SECRET=SECRET) for rank in range(SIZE)])


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home directory and a working directory of the test's own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def claim() -> Claim:
    return choose(environment(0))


def test_without_a_secret_rank_0_leaves_one_that_only_its_user_reads(home) -> None:
    into: dict[int, Ranks | LaunchError] = {}
    first = start(0, into)
    files = secret.places(claim())
    deadline = time.monotonic() + HANG_S
    while len(secret.found(files)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]
    assert files[0].parent == home / ".credit"
    assert files[0].parent.stat().st_mode & 0o777 == 0o700
    all_met(into, [first, *(start(rank, into) for rank in range(1, SIZE))])
    assert not any(file.exists() for file in files)


def test_a_secret_that_others_read_or_wrote_is_none(home, monkeypatch) -> None:
    files = secret.places(claim())
    with secret.left(files) as drawn:
        assert secret.found(files) == [drawn, drawn]
        files[0].chmod(0o640)
        assert secret.found(files) == [drawn]
        files[1].unlink()
        files[1].symlink_to(files[0])
        files[0].chmod(0o600)
        assert secret.found(files) == [drawn]
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert secret.found(files) == []


def test_where_no_secret_can_be_left_it_is_said(home, monkeypatch) -> None:
    (home / ".credit").write_text("a file")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LaunchError, match=r"secret nowhere \(.*home/.credit/start-.*\): export CREDIT_SECRET="):
        join(environment(0))


def refuse(*_: object) -> int:
    raise PermissionError(13, "Permission denied")


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(LaunchError, match="CREDIT_SECRET has 6 characters, and could be guessed"):
        join(environment(0, CREDIT_SECRET="secret"))


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_time_that_is_none(text) -> None:
    with pytest.raises(LaunchError, match=r"CREDIT_START_TIMEOUT is '.*', and must be a number of seconds"):
        join(environment(0, CREDIT_START_TIMEOUT=text))


def test_who_does_not_find_rank_0_says_where_it_looked(home, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "GRACE_S", 0.5)
    short = {"CREDIT_START_TIMEOUT": "0.5"}
    with pytest.raises(LaunchError, match=r"rank 1 on .* it left no secret. Did it start\? The ranks' secret lies in"):
        join(environment(1, **short))
    with pytest.raises(LaunchError, match="the name does not resolve here"):
        join(environment(1, SLURM_STEP_NODELIST="nowhere.invalid", CREDIT_SECRET=SECRET, **short))
    with pytest.raises(LaunchError, match=r"here localhost is a loopback address. Did it start, and may nodes talk"):
        join(environment(1, CREDIT_SECRET=SECRET, **short))
