"""Real gloo ranks for tests: started once, kept alive, and given one function after another.

    results = world.run(function, *args)     # function(*args) on every rank; the results, by rank

A function that raises on any rank fails the test with that rank's traceback; a rank that does not answer
in time has the whole world killed.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_context = mp.get_context("forkserver")
# torch._dynamo is imported by an optimiser's first step: a second of every rank, unless the server has done it.
_context.set_forkserver_preload(
    [
        *("torch", "torch.distributed.device_mesh", "torch.distributed.fsdp", "torch._dynamo"),
        *("credit.training.train", "credit.evaluation.forecast", "credit.evaluation.export"),
    ]
)

RANK_TIMEOUT_S = 180
MOST_THREADS = 60
"""Of a rank that is given another function. A group of gloo is three threads, one of which wakes 100 times a second as
long as the group lives: ranks that had made hundreds took half of two cores to wait."""


class RankError(AssertionError):
    """One or more ranks raised; `errors` maps rank to exception."""

    def __init__(self, errors: dict[int, tuple[BaseException, str]]) -> None:
        self.errors = {rank: error for rank, (error, _) in errors.items()}
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, (_, text) in errors.items()))


class World:
    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self._backend = size, backend
        self._start()

    def _start(self) -> None:
        self._store = tempfile.NamedTemporaryFile(prefix="credit-ranks-")  # noqa: SIM115
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, self.size, self._store.name, self._backend, theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 400, **kwargs: Any) -> list[Any]:
        self.begin(function, *args, **kwargs)
        return self.finish(timeout)

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start what `finish` gives the results of."""
        if any(_threads(process.pid) > MOST_THREADS for process in self._processes):
            self.close()
            self._start()
        call = pickle.dumps((function, args, kwargs))  # a pipe's own `send` makes a file of each tensor for each rank
        for pipe in self._pipes:
            pipe.send_bytes(call)

    def kill(self, rank: int) -> None:
        """End a rank as a node failure does."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def answers(self, rank: int, timeout: float) -> bool:
        """Wait for a rank; True if it ends its function, with a result or an error, in time."""
        return self._pipes[rank].poll(timeout)

    def finish(self, timeout: float = 400) -> list[Any]:
        """The results by rank."""
        results: list[Any] = []
        errors: dict[int, tuple[BaseException, str]] = {}
        deadline = time.monotonic() + timeout
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.size} gave no answer in {timeout} s")
            ok, value = pickle.loads(pipe.recv_bytes())
            results.append(value)
            if not ok:
                errors[rank] = value
        if errors:
            raise RankError(errors)
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _threads(pid: int | None) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return 0


def _serve(rank: int, size: int, store: str, backend: str, pipe: Any) -> None:
    # The server that forks ranks may be the one that loaders' workers are forked from, which is deaf to some signals.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    timeout = timedelta(seconds=RANK_TIMEOUT_S)
    if backend != "gloo":
        importlib.import_module(f"tests.{backend}")
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except Exception as error:
            answer = pickle.dumps((False, (_portable(error), traceback.format_exc())))
        pipe.send_bytes(answer)


def _portable(error: Exception) -> Exception:
    """`error`, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
