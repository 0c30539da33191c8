"""Time, bytes and memory of a model on shards against the plain model, alternated in one run. Prints a table.

    python benchmarks/domain_parallel.py --ranks 2 --case unet convnext conv
    python benchmarks/domain_parallel.py --ranks 2 --case conv --variant padded added

One thread a rank. "x plain" is the step time of the sharded model times the ranks, over the plain model's: 1.00 is
perfect where ranks have cores of their own. The plain model is timed twice: alone on the machine, and on every
rank at once, when it shares memory bandwidth and caches as the sharded ranks do. Memory is that of the tensors saved for
the backward, counted exactly.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelManager, convert_to_domain_parallel, layers, shard_tensor
from credit.domain_parallel.rules import windows
from credit.models import DOMAIN_CONVERTERS
from credit.models.unet import UNet


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.up = nn.Conv2d(channels, 4 * channels, 1)
        self.down = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(self.mix(x)))))


def conv() -> nn.Module:
    return nn.Conv2d(32, 32, 3, padding=1)


def convnext() -> nn.Module:
    return nn.Sequential(*[ConvNeXtBlock(16) for _ in range(3)])


def unet() -> nn.Module:
    return UNet(8, 8, (361, 720), width=16, levels=2)


ADDED = windows.keeps_rows

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (conv, (1, 32, 361, 720)),
    "convnext": (convnext, (1, 16, 361, 360)),
    "unet": (unet, (1, 8, 361, 720)),
}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors kept for the backward, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    total = sum(kept.values())
    del y
    return total


def timed(function: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int, ranks: int, store: str, cases: list[str], variants: list[str], repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    manager = DomainParallelManager(ranks, ranks)
    for case in cases:
        build, shape = CASES[case]
        torch.manual_seed(0)
        plain = build()
        x = torch.randn(shape)
        shard = shard_tensor(x, -2, manager)
        sharded = convert_to_domain_parallel(copy.deepcopy(plain), manager, custom_converters=DOMAIN_CONVERTERS)
        for variant in variants:
            windows.keeps_rows = layers.keeps_rows = ADDED if variant == "added" else (lambda *unused: False)
            _table_row(case, variant, plain, sharded, x, shard, manager, repeats)
    dist.destroy_process_group()


def _table_row(
    case: str,
    variant: str,
    plain: nn.Module,
    sharded: nn.Module,
    x: Tensor,
    shard: Tensor,
    manager: DomainParallelManager,
    repeats: int,
) -> None:
    ranks, rank = manager.domain_world_size, manager.domain_rank
    x, shard = x.requires_grad_(), shard.requires_grad_()
    step(sharded, shard)
    manager.traffic.reset()
    step(sharded, shard)
    sent = manager.traffic.bytes
    times: dict[str, list[float]] = {"alone": [], "crowd": [], "sharded": []}
    for _ in range(repeats):
        times["alone"].append(timed(lambda: step(plain, x) if rank == 0 else None))
        times["crowd"].append(timed(lambda: step(plain, x)))
        times["sharded"].append(timed(lambda: step(sharded, shard)))
    memory = saved_bytes(plain, x), saved_bytes(sharded, shard)
    if rank == 0:
        alone, crowd, ours = (statistics.median(times[name]) for name in ("alone", "crowd", "sharded"))
        print(
            f"{case:9s} {variant:7s} {ranks} ranks  plain {alone:6.3f} s ({crowd:6.3f} s beside others)  sharded {ours:6.3f} s"
            f"  = {ours * ranks / alone:4.2f} x plain ({ours * ranks / crowd:4.2f} x beside others)"
            f"  sent {sent / 1e6:6.2f} MB  kept {memory[1] / 1e6:6.1f} of {memory[0] / 1e6:6.1f} MB"
            f" = {memory[1] * ranks / memory[0]:4.2f} / ranks",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--variant", nargs="+", default=["added"], choices=["added", "padded"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments: Any = (ranks, f"{folder}/store", args.case, args.variant, args.repeats)
            mp.spawn(measure, arguments, nprocs=ranks)


if __name__ == "__main__":
    main()
