"""Short runs that end well, beside a load: does every rank end with 0?   python -m tests.launch.exits [RUNS] [RANKS]

Ranks are forked from a process that has imported torch, which takes seconds; where `python -m credit` leaves its end to
the interpreter, they end as it would: threads, exit handlers, modules, and the destructors of C++.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from credit.config import parse_config
from credit.data.prepare import write_statistics
from tests.stores import conf, dataset, write_zarr

DEADLINE_S = 240
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "torch._dynamo", "credit.training.train"])


def write_short(folder: Path) -> Path:
    """A config of ten steps, with its data."""
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", dataset()))
    raw["data"]["stats"] = str(folder / "stats.nc")
    raw["trainer"].update(parallelism={"data": "ddp", "domain": 2}, epochs=1, timeout=60)
    write_statistics(parse_config(raw))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def exit_codes(config: Path, run: Path, ranks: int) -> list[int | None]:
    """Of the ranks of one training into a new run directory; None for one that did not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {name: str(value) for name, value in place.items()}
        processes.append(_context.Process(target=_rank, args=(["train", str(config), "--set", f"run={run}"], env, run)))
        processes[-1].start()
    deadline = time.monotonic() + DEADLINE_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    for process in processes:
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _rank(arguments: list[str], env: dict[str, str], run: Path) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.update(env)
    os.dup2(os.open(f"{run}.{env['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.argv = ["credit", *arguments]
    runpy.run_module("credit", run_name="__main__", alter_sys=True)
    ctypes.pythonapi.Py_Exit(0)


def _burn() -> None:
    while True:
        pass


def main(runs: int = 200, ranks: int = 4) -> int:
    """Counts the ends of all runs; 1 if a rank of any did not end with 0."""
    loads = [
        multiprocessing.get_context("spawn").Process(target=_burn, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    for load in loads:
        load.start()
    ends: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="credit-exits-") as folder:
        config = write_short(Path(folder))
        for number in range(runs):
            codes = exit_codes(config, Path(folder, str(number)), ranks)
            ends["all 0" if not any(codes) else str(codes)] += 1
            if any(code != 0 for code in codes):
                for rank in range(ranks):
                    print(Path(folder, f"{number}.{rank}").read_text()[-600:], flush=True)
            if number % 20 == 19:
                print(f"{number + 1} runs, {time.monotonic() - begin:.0f} s: {dict(ends)}", flush=True)
    for load in loads:
        load.kill()
    return 0 if set(ends) == {"all 0"} else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
