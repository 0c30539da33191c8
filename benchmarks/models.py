"""The shipped models on one device: a training step against straightforward code, and where its time goes.

    python -m benchmarks.models
    python -m benchmarks.models --compiled --batch 2
    python -m benchmarks.models --grid 181 360 --config configs/wxformer_1deg.yaml --batch 1

One thread, alternated, medians. "written out" has attention as softmax(q k' / sqrt(n) + bias) v instead of torch's
fused kernels; "plain" is the model in a loop written by hand; "credit" is the same model as `credit train` runs it on
one device, clipping included. Floating-point operations are counted by torch.utils.flop_counter, over those of a large
product of matrices measured in the same run; "kept" are the tensors kept for the backward, counted exactly. Shares are
of the operators' own time in a step, by torch.profiler. --compiled: the step with blocks compiled as `trainer.compile`
does it, with the whole model compiled, and with the weights of convolutions in channels_last, over the plain one. 2
ranks against 1: benchmarks/domain_parallel.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.domain_parallel import keep_freed_memory, kept_bytes
from benchmarks.launch import seconds
from credit.config import load_config
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.collectives import clip_grad_norm_
from credit.parallel.fsdp2 import compile_blocks
from credit.parallel.mesh import build_device_mesh
from credit.parallel.parallelize import parallelize

CONFIGS = Path(__file__).parents[1] / "configs"
CHANNELS = (5, 3)
ONE = {"trainer": {"parallelism": {"data": "none", "tensor": 1, "domain": 1}}}
KINDS = {
    "convolution": ("conv",),
    "attention": ("attention", "softmax"),
    "products": ("mm", "linear", "einsum"),
    "copies": ("copy_", "cat", "clone", "index", "roll", "pad", "gather"),
}
"""Words in the names of operators; the first kind that has one."""


def written_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ v


@contextmanager
def attention_written_out() -> Iterator[None]:
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, written_out
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    (model(x) - y).square().mean().backward()
    clip(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def peak_flops(size: int = 1024) -> float:
    """Of one multiplication of matrices, the best of some, per second."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def shares(run: Callable[[], None]) -> dict[str, float]:
    with torch.profiler.profile() as profiler:
        run()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
            times[kind] += event.self_cpu_time_total
    return {kind: taken / sum(times.values()) for kind, taken in times.items()}


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each, alternated, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if repeat:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def row(config: Path, grid: tuple[int, int], batch: int, repeats: int) -> str:
    block = load_config(config).model
    torch.manual_seed(0)
    x, y = torch.randn(batch, CHANNELS[0], *grid), torch.randn(batch, CHANNELS[1], *grid)
    mesh, _ = build_device_mesh({"data": "none", "tensor": 1, "domain": 1}, "cpu")
    runs: dict[str, Callable[[], None]] = {}
    for name in ("written out", "plain", "credit"):
        model = build_model(block, *CHANNELS, grid)
        clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_
        if name == "credit":
            model, clip = parallelize(model, mesh, ONE, None, DOMAIN_CONVERTERS), clip_grad_norm_
        runs[name] = partial(step, model, torch.optim.AdamW(model.parameters()), clip, x, y)
    runs["written out"] = attention_written_out()(runs["written out"])
    median = medians(runs, repeats)
    kept = kept_bytes(model, x)
    with attention_written_out():
        kept_written_out = kept_bytes(model, x)
    with FlopCounterMode(display=False) as counter:
        runs["plain"]()
    flops = counter.get_total_flops()
    parts = " ".join(f"{share:11.0%}" for share in shares(runs["plain"]).values())
    return (
        f"{block.name:16s} {batch / median['plain']:9.2f} {median['written out'] / median['plain']:11.2f} "
        f"{median['credit'] / median['plain']:7.3f} {kept / 1e6:9.1f} {kept_written_out / kept:11.2f}  "
        f"{flops / 1e9:7.1f} {flops / median['plain'] / peak_flops():6.0%} {parts}"
    )


def channels_last(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)


PREPARED: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda model: None,
    "blocks": compile_blocks,
    "whole": lambda model: model.compile(),
    "channels_last": channels_last,
}


def compiled_row(config: Path, grid: tuple[int, int], batch: int, repeats: int) -> str:
    block = load_config(config).model
    x, y = torch.randn(batch, CHANNELS[0], *grid), torch.randn(batch, CHANNELS[1], *grid)
    runs: dict[str, Callable[[], None]] = {}
    for name, prepare in PREPARED.items():
        model = build_model(block, *CHANNELS, grid)
        prepare(model)
        fields = x.contiguous(memory_format=torch.channels_last) if name == "channels_last" else x
        runs[name] = partial(step, model, torch.optim.AdamW(model.parameters()), nn.utils.clip_grad_norm_, fields, y)
    median = medians(runs, repeats)
    return f"{block.name:16s} " + " ".join(f"{median[name] / median['plain']:13.2f}" for name in [*PREPARED][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=sorted(CONFIGS.glob("*_demo.yaml")))
    parser.add_argument("--grid", type=int, nargs=2, default=(61, 120), metavar=("LATITUDES", "LONGITUDES"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="compiled code and memory layouts instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.compiled:
        print(f"step / plain     {' '.join(f'{name:>13s}' for name in [*PREPARED][1:])}")
        for config in args.config:
            print(compiled_row(config, tuple(args.grid), args.batch, args.repeats), flush=True)
        return
    print(
        "                           step / plain          kept, MB,     / plain           of       share of time\n"
        "model            samples/s written out  credit     plain written out   GFLOP   peak "
        + " ".join(f"{kind:>11s}" for kind in [*KINDS, "other"])
    )
    for config in args.config:
        print(row(config, tuple(args.grid), args.batch, args.repeats), flush=True)


if __name__ == "__main__":
    main()
