"""A few steps of training on a mesh, and what they give: losses, gradient norms, parameters. Runs on ranks."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from credit.domain_parallel import DomainParallelManager
from credit.models import DOMAIN_CONVERTERS
from credit.models.transformer import ConvMLP, WindowTransformer
from credit.parallel import get_domain_manager, get_raw_model, shard_spatial
from credit.parallel.collectives import all_sum, clip_grad_norm_
from credit.parallel.ema import EMA
from credit.parallel.mesh import build_device_mesh, data_parallel_coords, gradient_mesh
from credit.parallel.parallelize import Gradients, parallelize
from credit.parallel.pieces import in_pieces, whole

CHANNELS, HEIGHT, WIDTH, BATCH, STEPS = 3, 19, 8, 8, 3
TOLERANCE = 1e-8
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if shape[0] * shape[1] * shape[2] <= 8]
MODES: dict[str, dict[str, Any]] = {
    "none": {"data": "none"},
    "ddp": {"data": "ddp"},
    "fsdp2 over dp": {"data": "fsdp2", "shard_over": "dp"},
    "fsdp2 over dp x domain": {"data": "fsdp2"},
}


def same_as(mode: str, shape: tuple[int, int, int]) -> str:
    """The mode that lays a model out on this mesh just as `mode` does.

    A mesh has no axis of one rank; where FSDP2 or DDP has nothing to share over, and for tensor-parallel weights, which
    DDP does not take, gradients are averaged as they are with `none`.
    """
    dp, tp, domain = shape
    if dp > 1:
        return "fsdp2 over dp x domain" if mode == "fsdp2 over dp" and domain == 1 else mode
    alone = {"fsdp2 over dp": True, "fsdp2 over dp x domain": domain == 1, "ddp": domain == 1 or tp > 1}
    return "none" if alone.get(mode) else mode


class Stage(nn.Module):
    """Norm, a strided or plain convolution, and a wide pair of which one weight is computed."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.mlp = ConvMLP(channels, 2)
        nn.utils.parametrizations.spectral_norm(self.mlp.project)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(x))
        return x + self.mlp(x)


class ConvNet(nn.Module):
    fsdp_blocks = (Stage,)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 8, 5, padding=2)
        self.stages = nn.Sequential(Stage(8, 1), Stage(8, 2))
        self.head = nn.Conv2d(8, CHANNELS, 1)
        self.bias = nn.Parameter(0.1 * torch.randn(CHANNELS, HEIGHT, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.stages(torch.tanh(self.stem(x))), (HEIGHT, WIDTH), mode="bilinear")
        return self.head(y) + self.bias


class Transformer(WindowTransformer):
    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS, (HEIGHT, WIDTH), width=16, depth=2, heads=8, window=2, ratio=2)
        nn.init.normal_(self.head.conv.weight, std=0.1)


MODELS = {"convnet": ConvNet, "transformer": Transformer}


def conf(mode: str, tp: int, domain: int, **trainer: Any) -> dict[str, Any]:
    own = {**MODES[mode], **trainer}
    return {"trainer": {"parallelism": {"data": own.pop("data"), "tensor": tp, "domain": domain}, **own}}


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y, torch.linspace(0.2, 1.8, HEIGHT, dtype=torch.float64)[:, None]


@cache
def layout(data: str, tp: int, domain: int) -> tuple[DeviceMesh | None, DomainParallelManager]:
    """The mesh and its manager, made once: starting process groups takes longer than the steps."""
    mesh, _ = build_device_mesh({"data": data, "tensor": tp, "domain": domain}, "cpu")
    return mesh, DomainParallelManager.from_mesh(mesh)


def curve(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms and final parameters of a few steps with AdamW and clipping."""
    parallelism = given["trainer"]["parallelism"]
    data_mode = "none" if parallelism["data"] == "none" else "ddp"  # the mesh does not depend on which it is
    mesh, manager = layout(data_mode, parallelism["tensor"], parallelism["domain"])
    flat = gradient_mesh(mesh)
    dp_rank, dp_size = data_parallel_coords(given)
    torch.manual_seed(0)
    model = parallelize(MODELS[name]().double(), mesh, given, manager, DOMAIN_CONVERTERS)
    assert (get_domain_manager(model) is manager) == (manager.domain_world_size > 1)
    gradients = Gradients(model, mesh, given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema = EMA(model, 0.7)
    parts = given["trainer"].get("accumulate", 1)
    losses, norms = [], []
    for step in range(STEPS):
        share = BATCH // dp_size // parts
        loss = torch.zeros((), dtype=torch.float64)
        for part in range(parts):
            first = dp_rank * share * parts + part * share
            x, y, weight = data(step)
            x, y = shard_spatial((x[first : first + share], y[first : first + share]), manager)
            weight = shard_spatial(weight, manager)
            with gradients.adding_up(part == parts - 1):
                mine = ((model(x) - y).square() * weight).sum() / (BATCH * CHANNELS * HEIGHT * WIDTH)
                (mine * (flat.size() if flat is not None else 1)).backward()
            loss += mine.detach()
        gradients.reduce()
        norms.append(float(clip_grad_norm_(model.parameters(), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)
        losses.append(float(all_sum(loss)) / given["trainer"]["parallelism"]["tensor"])
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        **{
            path: whole(p).detach()
            for path, p in in_pieces(model, dict(get_raw_model(model).named_parameters())).items()
        },
        **{f"ema {path}": whole(p).detach() for path, p in in_pieces(model, ema.average).items()},
        **{f"buffer {path}": buffer for path, buffer in get_raw_model(model).named_buffers()},
    }


@cache
def serial(name: str) -> dict[str, Any]:
    return curve(name, conf("none", 1, 1))


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    errors = {
        key: float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-30)) if value.numel() else 0.0
        for key, value in wanted.items()
    }
    return {key: error for key, error in errors.items() if not error < TOLERANCE}


def compared(name: str, given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    return worst(curve(name, given), wanted)
