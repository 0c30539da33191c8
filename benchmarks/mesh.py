"""What a rank keeps and sends on each mesh, against the least there can be; what the wrappers cost on a world of one.

    python benchmarks/mesh.py --ranks 2 4 8
    python benchmarks/mesh.py --overhead

Kept: bytes of parameters and AdamW's moments on the rank that stores most, over the formula
3 x (those outside the cut layers + those inside / tp) / (ranks that FSDP2 shards over).

Sent: every message and collective that torch dispatches in one step (forward, backward, reduction, clipping,
optimiser) is seen by a dispatch mode, whoever started it. Bytes are those that a ring sends. The least is the sum of

* data: each gradient once around (ddp); two gathers and a reduce-scatter of each block's parameters, and of the rest,
  which stay gathered for the backward, one gather less (fsdp2). One collective a block each time; one for all with ddp.
* tensor: a sum of the output in the forward and of the input's gradient in the backward, for each pair of a column and
  a row layer; a sum of the gradient of each parameter that every rank has whole and uses with its own channels.
* domain: the halo messages and collectives that the plan of the operators asks for (`credit plan`; that they are the
  least for each operator is tested in tests/domain_parallel/test_traffic.py).
* one scalar, the norm of the gradients, around the world.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from credit.config.parallelism import Sharding
from credit.domain_parallel import DomainParallelManager
from credit.models import DOMAIN_CONVERTERS
from credit.models.transformer import WindowTransformer
from credit.parallel.collectives import clip_grad_norm_, gather_objects, local
from credit.parallel.mesh import MeshShape, build_device_mesh
from credit.parallel.meters import Wire
from credit.parallel.parallelize import Gradients, parallelize
from credit.parallel.plan import Planner, Work
from credit.parallel.tensor_parallel import cut_layers

FIELD, WIDTH, DEPTH, BATCH = (8, 64, 64), 64, 4, 8


def build(rows: int = FIELD[1]) -> nn.Module:
    return WindowTransformer(FIELD[0], FIELD[0], (rows, FIELD[2]), width=WIDTH, depth=DEPTH, heads=8, window=4)


def step(model: nn.Module, optimizer: Any, gradients: Gradients, x: Tensor) -> None:
    with gradients.adding_up(last=True):
        (model(x) - x).square().mean().backward()
    gradients.reduce()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def row(shape: MeshShape, data: str) -> None:
    parallelism = {"data": data, "tensor": shape.tp, "domain": shape.domain}
    given = {"trainer": {"parallelism": parallelism, "batch_size": BATCH}}
    mesh, _ = build_device_mesh(parallelism, "cpu")
    manager = DomainParallelManager.from_mesh(mesh)
    torch.manual_seed(0)
    model = parallelize(build(), mesh, given, manager, DOMAIN_CONVERTERS)
    gradients = Gradients(model, mesh, given)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(BATCH // shape.dp, FIELD[0], FIELD[1] // shape.domain, FIELD[2])
    for _ in range(2):  # DDP lays its buckets out anew after the first step
        step(model, optimizer, gradients, x)
    with Wire() as wire:
        step(model, optimizer, gradients, x)
    kept = sum(local(p).nbytes for p in model.parameters())
    kept += sum(local(t).nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
    seen = max(gather_objects((kept, wire.bytes, wire.calls)))
    if dist.get_rank() == 0:
        inside = sum(p.numel() for _, layer in cut_layers(model) for p in layer.parameters())
        report(shape, data, given, seen, inside)


def report(shape: MeshShape, data: str, given: dict, seen: tuple[int, int, int], inside: int) -> None:
    """Print one line. `inside`: numbers of the whole cut layers."""
    size = 4 * (sum(p.numel() for p in build().parameters()) - inside + inside / shape.tp)
    kept = 3 * size / (shape.dp * shape.domain if data == "fsdp2" else 1)
    least = Planner(build, FIELD, Sharding.of(given), Work(BATCH), DOMAIN_CONVERTERS).cost(shape)
    sent, calls = least.data + least.tensor + least.domain, least.messages + least.collectives + 1
    print(
        f"{shape.dp:3d} {shape.tp:3d} {shape.domain:6d}  {data:5s} {seen[0] / 1e6:8.3f} {seen[0] / kept:9.3f}"
        f"  {seen[1] / 1e6:8.3f} {seen[1] / sent:9.3f}  {seen[2]:5d} {calls:7d}",
        flush=True,
    )


def rows(rank: int, ranks: int, store: str) -> None:
    join(rank, ranks, store)
    for tp, domain in itertools.product((1, 2, 4, 8), repeat=2):
        if ranks % (tp * domain) == 0:
            shape = MeshShape(ranks // tp // domain, tp, domain)
            for data in ("ddp", "fsdp2"):
                row(shape, data)
    dist.destroy_process_group()


def join(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def overhead(rank: int, ranks: int, store: str, repeats: int) -> None:
    """A training step of the plain model with torch's own loop, and of ours with every mode, alternated."""
    join(rank, ranks, store)
    x = torch.randn(2, *FIELD)

    def plain_step(model: nn.Module, optimizer: Any) -> None:
        (model(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    runs: dict[str, Callable[[], None]] = {}
    for data in ("plain", "plain again", "none", "ddp", "fsdp2"):
        torch.manual_seed(0)
        model = build()
        given = {"trainer": {"parallelism": {"data": data if " " not in data and data != "plain" else "none"}}}
        mesh, _ = build_device_mesh({"data": "none", "tensor": 1, "domain": 1}, "cpu")
        if data not in ("plain", "plain again"):
            model = parallelize(model, mesh, given, None, DOMAIN_CONVERTERS)
        optimizer = torch.optim.AdamW(model.parameters())
        ours = partial(step, model, optimizer, Gradients(model, mesh, given), x)
        runs[data] = partial(plain_step, model, optimizer) if data.startswith("plain") else ours
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["plain"])
    for name, taken in times.items():
        print(f"{name:12s} {1e3 * statistics.median(taken):8.1f} ms  {statistics.median(taken) / plain:6.3f}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--overhead", action="store_true", help="time a world of one instead")
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.overhead:
            overhead(0, 1, f"{folder}/store", args.repeats)
            return
        print("                       kept, MB  /formula  sent, MB    /least  calls   least\n dp  tp domain  data")
        for ranks in args.ranks:
            mp.spawn(rows, (ranks, f"{folder}/{ranks}"), nprocs=ranks)


if __name__ == "__main__":
    main()
