"""A command run again as several ranks on this machine's CPU, as torchrun would start them. No torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from credit.errors import LaunchError


def run_on_local_ranks(arguments: Sequence[str], ranks: int, timeout: float) -> int:
    """Run `credit ARGUMENTS` as that many processes of one thread each, on gloo, and wait for all.

    Returns:
        The largest exit code.

    Raises:
        LaunchError: if they take longer than `timeout` seconds, or one is ended by a signal. None is left running.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "credit", *arguments]
    processes: list[subprocess.Popen] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(ranks):
            given = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            env = {**os.environ, **{name: str(value) for name, value in given.items()}}
            processes.append(subprocess.Popen(command, env=env))
        codes = [process.wait(max(deadline - time.monotonic(), 0)) for process in processes]
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{ranks} local ranks were not done in {timeout:g} s: give them longer with --set trainer.timeout=SECONDS"
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        if code < 0:
            raise LaunchError(f"rank {rank} of {ranks} was ended by signal {-code}: is there memory for all of them?")
    return max(codes)
