"""What the launch checks cost: before the first step, in every step, and for thousands of ranks (simulated).

    python benchmarks/launch.py --ranks 8
    python benchmarks/launch.py --simulate 4096

On real ranks, for the quickstart's model on demo weather: seconds of each check before the first step (the slowest
rank's), and of what a step has of them, over the step's own, alternated, medians. Simulated: numbering and the sampler
contract are O(ranks), its completeness O(samples), each computed on one process from the facts of that many.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from credit.config import load_config
from credit.data.prepare import make_built_in
from credit.launch.contract import Who, _Pass, checksum, refuse_broken_contract, refuse_incomplete
from credit.launch.job import _agree, start_job
from credit.launch.ranks import Claim
from credit.launch.rendezvous import Arrival, _host, _visit, number
from credit.layout import MeshShape, straddling
from credit.parallel.collectives import all_sum, gather_objects
from credit.training.train import TrainingRun


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def on_ranks(rank: int, ranks: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    given = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29612}
    os.environ.update({name: str(value) for name, value in given.items()}, GLOO_SOCKET_IFNAME="lo")
    changes = [f"run={folder}", "trainer.batch_size=8"]
    with start_job(lambda: load_config("configs/quickstart.yaml", changes)) as job:
        agree = seconds(lambda: _agree(job.config, job.device))
        run = TrainingRun(job)
        contract = seconds(lambda: run._enforce_contract(0))
        loader = run.loaders["train"]
        batch = next(iter(loader.loader))
        first = seconds(lambda: loader._compare(checksum(batch, loader.whole), 0))
        step, compare, loss, flags = [], [], [], []
        share = torch.zeros((), dtype=torch.float64)
        for number in range(1, steps + 1):
            step.append(seconds(lambda: run.train_step(batch, 0)))
            dist.barrier()
            compare.append(seconds(lambda number=number: loader._compare(checksum(batch, loader.whole), number)))
            dist.barrier()
            loss.append(seconds(lambda: all_sum(share)))
            dist.barrier()
            flags.append(seconds(lambda: all_sum(torch.zeros(4, dtype=torch.float64))))
        mine = (agree, contract, first, *(statistics.median(one) for one in (step, compare, loss, flags)))
        agree, contract, first, each, compared, alone, flagged = map(max, zip(*gather_objects(mine), strict=True))
        percent = 100 * compared / loader.every / each
        job.say(
            f"{ranks} ranks, before the first step: config, versions, devices {agree:.3f} s, sampler contract "
            f"{contract:.3f} s, first batch {first:.3f} s; together {agree + contract + first:.3f} s\n"
            f"in a step of {each:.3f} s: comparison of batches, every {loader.every}th, {1e3 * compared:.2f} ms = "
            f"{percent:.3f} % of the time; what all say of the next batch and of stopping, which goes with the loss, "
            f"{1e3 * (flagged - alone):.2f} ms = {100 * (flagged - alone) / each:.3f} % (a message of "
            f"{1e3 * flagged:.2f} ms, of the loss alone {1e3 * alone:.2f} ms)"
        )


def simulate(ranks: int) -> None:
    shape = MeshShape(ranks // 16, 4, 4)
    hosts = [f"node{rank % (ranks // 4)}" for rank in range(ranks)]  # cyclic, 4 a node
    arrivals = [Arrival(rank, ranks, host, rank) for rank, host in enumerate(hosts)]
    samples = 500 * ranks
    told = [np.arange(replica, samples, shape.dp) for replica in range(shape.dp)]
    passes = [_Pass(host, 8000, str(rank // 16), "", samples, 1) for rank, host in enumerate(hosts)]
    people = [Who(rank, host, shape) for rank, host in enumerate(hosts)]
    rows = {
        "numbering": lambda: number(arrivals),
        "groups that straddle nodes": lambda: straddling(shape, hosts),
        "sampler contract, equal within replicas": lambda: refuse_broken_contract(people, passes),
        f"sampler contract, {samples:,} samples once": lambda: refuse_incomplete(told, people[::16], samples, 0, 1),
    }
    for name, function in rows.items():
        print(f"{ranks} ranks: {name}: {seconds(function):.3f} s")
    meet(256)


def meet(ranks: int) -> None:
    """As many processes as this machine bears; the clock starts when all run."""
    context = mp.get_context("fork")
    job, host = str(os.getpid()), "localhost"
    claims = [Claim("slurm", "srun", rank, ranks, job=job, first_host=host) for rank in range(ranks)]
    ready = context.Barrier(ranks)

    def visit(claim: Claim) -> None:
        ready.wait()
        _visit(claim, Arrival(claim.rank, ranks, host, claim.rank), time.monotonic() + 60)

    visitors = [context.Process(target=visit, args=(claim,)) for claim in claims[1:]]
    for visitor in visitors:
        visitor.start()
    ready.wait()
    took = seconds(lambda: _host(claims[0], Arrival(0, ranks, host, 0), time.monotonic() + 60))
    for visitor in visitors:
        visitor.join()
    through = [visitor.exitcode for visitor in visitors].count(0) + 1
    print(f"{through} of {ranks} processes of this machine meet over loopback: {took:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--simulate", type=int, default=None, metavar="RANKS")
    args = parser.parse_args()
    if args.simulate:
        simulate(args.simulate)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_built_in(load_config("configs/quickstart.yaml", [f"run={Path(folder)}"]))
        mp.spawn(on_ranks, (args.ranks, folder, args.steps), nprocs=args.ranks)


if __name__ == "__main__":
    main()
