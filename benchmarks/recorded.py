"""A step of the models on shards: eager, recorded and compiled, and the plain model's, alternated in one run.

    python -m benchmarks.recorded --model wxformer unet unet_diffusion pangu

The models are as deep as those of configs/*_0p25deg.yaml and *_1deg.yaml, but narrow, on small grids: as many calls,
and hardly any arithmetic. So these are the costs of Python, of launching and of the wire, which an accelerator would
wait for. 2 gloo ranks, one thread each. "CPU" is processor time of the main thread of rank 0, which leaves waiting out;
"wall" is until all ranks are done.
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

from credit.domain_parallel import DomainParallelManager, convert_to_domain_parallel, record, shard_tensor
from credit.models import DOMAIN_CONVERTERS
from credit.models.pangu import Pangu
from credit.models.unet import UNet
from credit.models.unet_diffusion import DiffusionUNet
from credit.models.wxformer import WXFormer

RANKS = 2

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def wxformer() -> nn.Module:
    kernels, windows = ((4, 8, 16, 32), (2, 4), (2, 4), (2, 4)), {"local_window": 4, "global_windows": (4, 4, 2, 2)}
    sizes: dict[str, Any] = {"widths": (8, 16, 32, 64), "depths": (2, 2, 8, 2), "strides": (2, 2, 2, 2), **windows}
    return WXFormer(10, 8, (56, 56), kernels=kernels, head_width=8, padding=4, spectral_norm=True, **sizes)


def pangu() -> nn.Module:
    sizes: dict[str, Any] = {"window": (2, 3, 6), "patch": (2, 4, 4), "depth": 2, "coarse_depth": 12, "heads": 1}
    return Pangu(17, 14, (48, 96), upper=5, levels=2, width=6, **sizes)


CASES: dict[str, Case] = {
    "unet": (lambda: UNet(10, 8, (16, 32), width=8, levels=3), (1, 10, 16, 32)),
    "unet_diffusion": (
        lambda: DiffusionUNet(10, 8, (16, 32), width=8, levels=3, blocks=2, heads=2),
        (1, 10, 16, 32),
    ),
    "wxformer": (wxformer, (1, 10, 56, 56)),
    "pangu": (pangu, (1, 17, 48, 96)),
}


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """(seconds until all ranks are done, CPU seconds of this rank's main thread)."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    run()
    cpu = time.thread_time() - cpu
    dist.barrier()
    return time.perf_counter() - wall, cpu


def measure(rank: int, store: str, names: list[str], repeats: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    manager = DomainParallelManager(RANKS, RANKS)
    for name in names:
        build, shape = CASES[name]
        torch.manual_seed(0)
        plain, x = build(), torch.randn(shape)
        shard = shard_tensor(x, -2, manager)

        def sharded(plain: nn.Module = plain) -> nn.Module:
            return convert_to_domain_parallel(copy.deepcopy(plain), manager, custom_converters=DOMAIN_CONVERTERS)

        models = {"plain": (plain, x), "eager": (sharded(), shard), "recorded": (record(sharded()), shard)}
        if compiled:
            models["compiled"] = (record(sharded(), compiled=True), shard)
        first = {}
        for variant, (model, given) in models.items():
            began = time.perf_counter()
            for _ in range(3):
                step(model, given)
            first[variant] = time.perf_counter() - began
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in models}
        for _ in range(repeats):
            for variant, (model, given) in models.items():
                times[variant].append(timed(lambda model=model, given=given: step(model, given)))  # type: ignore[misc]
        if rank == 0:
            report(name, times, first)
    dist.destroy_process_group()


def report(name: str, times: dict[str, list[tuple[float, float]]], first: dict[str, float]) -> None:
    medians = {
        variant: [1e3 * statistics.median(column) for column in zip(*taken, strict=True)]
        for variant, taken in times.items()
    }
    eager = medians["eager"]
    for variant, (wall, cpu) in medians.items():
        print(
            f"{name:15s} {variant:9s} {cpu:8.1f} {wall:9.1f} {cpu / eager[1]:9.2f} {wall / eager[0]:7.2f}"
            f" {first[variant]:10.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--compiled", action="store_true", help="by inductor too, which takes minutes")
    args = parser.parse_args()
    print(
        "                                              of the eager step's   first three\n"
        "model           step        CPU, ms  wall, ms       CPU    wall   steps, s"
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (f"{folder}/store", args.model, args.repeats, args.compiled), nprocs=RANKS)


if __name__ == "__main__":
    main()
