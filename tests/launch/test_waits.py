"""Every wait at the start is bounded, whoever starts the ranks: a peer that never comes, or comes and stops."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from credit.errors import LaunchError
from credit.launch import job
from credit.launch.ranks import Ranks
from tests.launch.exits import write_short

BIN = Path(sys.executable).parent
HANG_S = 240
"""Far above the few seconds that these starts are given, and Python and torch to load."""
LATE = """
import os, runpy, signal, sys
if os.environ.get("PMI_RANK") == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
sys.argv = ["credit", "layout", sys.argv[1]]
runpy.run_module("credit", run_name="__main__", alter_sys=True)
"""
STOPS = """
import os, runpy, signal, sys
import credit.launch.network as network
agree = network.agree
def stand_still(*args, **kwargs):
    agree(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGSTOP)
network.agree = stand_still
sys.argv = ["credit", *sys.argv[1:]]
runpy.run_module("credit", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_short(tmp_path_factory.mktemp("waits"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def of_torchrun(rank: int, port: int | str, **more: str) -> dict[str, str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return {**os.environ, **place, "MASTER_PORT": str(port), "CREDIT_START_TIMEOUT": "4", **more}


def ended(*words: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, timeout=HANG_S)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_of_torchrun_that_never_comes(rank, config) -> None:
    done = ended(sys.executable, "-m", "credit", "layout", config, env=of_torchrun(rank, free_port()))
    assert done.returncode == 2
    assert f"credit: error: rank {rank} on" in done.stderr
    assert "did not meet the others" in done.stderr


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x', and must be a whole number"),
        ({"MASTER_ADDR": "127.0.0.1"}, "the environment has no MASTER_PORT"),
        ({"MASTER_PORT": "29500"}, "the environment has no MASTER_ADDR"),
    ],
)
def test_addresses_of_torchrun_that_are_none(env, said, monkeypatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=said):
        job._store(Ranks(0, 2, 0, "torchrun"), timedelta(seconds=1))


def test_a_peer_that_stands_still_before_the_groups_are_made(config) -> None:
    """All have come, and the network is tried out: then torch waits, by trainer.timeout."""
    port, limit = free_port(), ["--set", "trainer.timeout=5", "--set", "trainer.parallelism.domain=2"]
    words, long = ["layout", str(config), *limit], {"CREDIT_START_TIMEOUT": "90"}
    stopped = subprocess.Popen([sys.executable, "-c", STOPS, *words], env=of_torchrun(1, port, **long))
    try:
        begin = time.monotonic()
        done = ended(sys.executable, "-m", "credit", *words, env=of_torchrun(0, port, **long))
        assert time.monotonic() - begin < HANG_S
    finally:
        stopped.send_signal(signal.SIGKILL)
        stopped.wait()
    assert done.returncode in (1, 2)
    assert done.stderr.count("credit: error: ") == 1, done.stderr
    assert "did not meet the others" in done.stderr or "does not answer" in done.stderr, done.stderr


def test_a_peer_of_mpiexec_that_never_comes(config, tmp_path) -> None:
    """It has started, and stands still before MPI: which would wait for it without a bound, and hold Python's lock."""
    if shutil.which("mpiexec", path=BIN) is None:
        pytest.skip("needs the wheel of mpich")
    (tmp_path / "late.py").write_text(LATE)
    env = {**os.environ, "CREDIT_START_TIMEOUT": "3"}
    done = ended(BIN / "mpiexec", "-n", 2, sys.executable, tmp_path / "late.py", config, env=env)
    assert done.returncode != 0
    assert "MPI waits for ranks that do not come" in done.stderr
