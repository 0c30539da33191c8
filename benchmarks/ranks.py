"""Ranks that are threads of one process against ranks that are processes: how many small parities a minute.

    python benchmarks/ranks.py --ranks 2 3 4

Each module below is verified sharded against plain, outputs and all gradients, as the tests do. Both kinds of ranks are
there before the clock starts; they take turns in one run, and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from credit.domain_parallel import DomainParallelManager, verify_parity

SHAPE = (2, 4, 17, 6)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "strided convolution": lambda: nn.Conv2d(4, 4, 4, stride=2, padding=1),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "three layers": lambda: nn.Sequential(nn.Conv2d(4, 8, 5, padding=2), nn.GroupNorm(2, 8), nn.GELU()),
}


def parities(times: int, manager: DomainParallelManager | None, ranks: int | None) -> float:
    """Seconds for all modules, that many times."""
    began = time.perf_counter()
    for _ in range(times):
        for name, build in MODULES.items():
            torch.manual_seed(0)
            report = verify_parity(build(), (torch.randn(SHAPE),), manager, ranks=ranks)
            assert report.exact, f"{name}\n{report}"
    return time.perf_counter() - began


def serve(rank: int, size: int, store: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    manager = DomainParallelManager(size, size)
    while times := orders.recv():
        orders.send(parities(times, manager, None))


def compare(size: int, rounds: int, times: int) -> None:
    context = mp.get_context("spawn")
    with tempfile.NamedTemporaryFile() as store:
        ours, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(rank, size, store.name, theirs)))
            processes[-1].start()
            ours.append(mine)

        def on_processes(times: int) -> float:
            for pipe in ours:
                pipe.send(times)
            return max(pipe.recv() for pipe in ours)

        on_processes(1)
        parities(1, None, size)
        seconds = [(on_processes(times), parities(times, None, size)) for _ in range(rounds)]
        for pipe in ours:
            pipe.send(0)
        for process in processes:
            process.join()
    of_processes, of_threads = (statistics.median(column) for column in zip(*seconds, strict=True))
    count = 60 * times * len(MODULES)
    print(
        f"{size:5} {count / of_processes:14.0f} {count / of_threads:14.0f} {of_processes / of_threads:8.2f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=10, help="times that each module is verified in a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("ranks  on processes/min  on threads/min  ratio")
    for size in given.ranks:
        compare(size, given.rounds, given.times)


if __name__ == "__main__":
    main()
