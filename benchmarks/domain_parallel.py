"""Time, bytes and memory of a model on shards against the plain model, alternated in one run. Prints a table.

    python benchmarks/domain_parallel.py --ranks 2 4
    python benchmarks/domain_parallel.py --case conv --variant added padded dtensor --forward

One thread a rank. The ratios are the step time of the sharded model times the ranks, over the plain model's: 1.00 is
perfect where ranks have cores of their own. The plain model is timed twice: alone on the machine, and on every rank at
once, when it shares memory bandwidth and caches as the sharded ranks do. The ratio of CPU seconds leaves waiting out.
Memory is that of the tensors kept for the backward, counted exactly: storages of distinct tensors, parameters aside.

Variants: "added" adds what the halo contributes to the convolution of the local rows, "padded" attaches the halo to a
copy of the shard, "dtensor" is torch's own DTensor, cut along longitude, which is the axis that its convolution has
halos for. With torch 2.13 the backward of that stops with an error on the CPU, so compare it with --forward.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
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
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from credit.config import load_config
from credit.domain_parallel import DomainParallelManager, convert_to_domain_parallel, layers, shard_tensor
from credit.domain_parallel.rules import convolution
from credit.models import DOMAIN_CONVERTERS, build_model
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


def model_of(config: str, grid: tuple[int, int]) -> nn.Module:
    return build_model(load_config(f"configs/{config}.yaml").model, 5, 3, grid)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(32, 32, 3, padding=1), (1, 32, 361, 720)),
    "convnext": (lambda: nn.Sequential(*[ConvNeXtBlock(16) for _ in range(3)]), (1, 16, 361, 360)),
    "unet": (lambda: UNet(8, 8, (361, 720), width=16, levels=2), (1, 8, 361, 720)),
    "wxformer": (lambda: model_of("wxformer_demo", (181, 360)), (1, 5, 181, 360)),
    "diffusion": (lambda: model_of("unet_diffusion_demo", (181, 360)), (1, 5, 181, 360)),
    "pangu": (lambda: model_of("pangu_demo", (181, 360)), (1, 5, 181, 360)),
    "unet-globe": (lambda: UNet(8, 8, (721, 1440), width=16, levels=2), (1, 8, 721, 1440)),
}
KEEPS_ROWS = convolution.keeps_rows


Step = Callable[[nn.Module, Tensor], None]


def train(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)  # held until counted, so that no storage is used twice
    total = sum(kept.values())
    del y
    return total


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """(seconds until all ranks are done, CPU seconds of this rank)."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    function()
    cpu = time.process_time() - cpu
    dist.barrier()
    return time.perf_counter() - start, cpu


def variant_of(name: str, plain: nn.Module, x: Tensor, manager: DomainParallelManager) -> tuple[nn.Module, Tensor]:
    """The sharded model and its input."""
    if name == "dtensor":
        mesh = dist.init_device_mesh("cpu", (manager.domain_world_size,))
        return distribute_module(copy.deepcopy(plain), mesh), distribute_tensor(x, mesh, [Shard(3)])
    convolution.keeps_rows = layers.keeps_rows = KEEPS_ROWS if name == "added" else lambda *unused: False
    model = convert_to_domain_parallel(copy.deepcopy(plain), manager, custom_converters=DOMAIN_CONVERTERS)
    return model, shard_tensor(x, -2, manager)


def row(case: str, variant: str, manager: DomainParallelManager, repeats: int, step: Step) -> None:
    ranks, rank = manager.domain_world_size, manager.domain_rank
    build, shape = CASES[case]
    torch.manual_seed(0)
    plain, x = build(), torch.randn(shape, requires_grad=True)
    sharded, shard = variant_of(variant, plain, x.detach(), manager)
    shard = shard.requires_grad_()
    step(sharded, shard)
    manager.traffic.reset()
    step(sharded, shard)
    sent = manager.traffic.bytes / 1e6 if variant != "dtensor" else float("nan")
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "crowd": [], "sharded": []}
    for _ in range(repeats):
        times["alone"].append(timed(lambda: step(plain, x) if rank == 0 else None))
        times["crowd"].append(timed(lambda: step(plain, x)))
        times["sharded"].append(timed(lambda: step(sharded, shard)))
    whole = kept_bytes(plain, x)
    kept = kept_bytes(sharded, shard) * ranks / whole if variant != "dtensor" else float("nan")
    if rank == 0:
        wall = {name: statistics.median(seconds for seconds, _ in taken) for name, taken in times.items()}
        cpu = {name: statistics.median(seconds for _, seconds in taken) for name, taken in times.items()}
        alone, crowd, ours = wall["alone"], wall["crowd"], wall["sharded"]
        print(
            f"{case:10s} {variant:8s} {ranks:5d}  {alone:9.3f} {crowd:9.3f} {ours:9.3f}  {ours * ranks / alone:9.2f}"
            f" {ours * ranks / crowd:9.2f} {cpu['sharded'] * ranks / cpu['crowd']:7.2f}  {sent:8.2f}  {kept:7.2f}",
            flush=True,
        )


def keep_freed_memory() -> None:
    """Let malloc reuse what was freed, as the allocator of an accelerator does, instead of faulting pages in anew."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def measure(rank: int, ranks: int, store: str, cases: list[str], variants: list[str], repeats: int, step: Step) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    manager = DomainParallelManager(ranks, ranks)
    for case in cases:
        for variant in variants:
            if variant != "dtensor" or case == "conv":
                row(case, variant, manager, repeats, step)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--case", nargs="+", default=list(CASES)[:3], choices=list(CASES))
    parser.add_argument("--variant", nargs="+", default=["added"], choices=["added", "padded", "dtensor"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forward", action="store_true", help="time the forward alone")
    args = parser.parse_args()
    print(
        "                           plain    plain,            sharded x ranks / plain               kept x\n"
        "case       variant  ranks    alone, s beside, s sharded, s    alone    beside     CPU   MB sent  ranks / plain"
    )
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments: Any = (
                ranks,
                f"{folder}/store",
                args.case,
                args.variant,
                args.repeats,
                forward if args.forward else train,
            )
            mp.spawn(measure, arguments, nprocs=ranks)


if __name__ == "__main__":
    main()
