"""In bfloat16 and TF32 the sharded model is as far from float64 as the plain one is, but for a factor of 1.5."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from credit.config.models import MODELS
from credit.domain_parallel import convert_to_domain_parallel, get_domain_parallel_manager, shard_tensor
from credit.domain_parallel.thread_ranks import thread_ranks
from credit.models import DOMAIN_CONVERTERS, load_model_class
from tests.models.kinds import SMALL

RANKS, FACTOR, ROUNDING = 3, 1.5, 1e-6
"""Where the plain result is that of float32, so may be the sharded one's error."""
aten = torch.ops.aten
PRODUCTS = {aten.convolution, aten.convolution_backward, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.linear}
PRODUCTS |= {aten.convolution_overrideable, aten._scaled_dot_product_flash_attention_for_cpu}


class Tf32(TorchDispatchMode):
    """Products get operands of float32 that are rounded to 10 bits, as TF32 has them."""

    def __enter__(self) -> Any:
        torch.set_float32_matmul_precision("high")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_float32_matmul_precision("highest")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            args = tree_map_only(Tensor, _rounded, args)
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


PRECISIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "tf32": Tf32,
    "float64": nullcontext,
}


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm([19, 16]),
    "rms norm": lambda: nn.RMSNorm([19, 16]),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "average pooling": lambda: nn.AvgPool2d(3, 2, 1),
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "mean over the globe": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample((37, 31), mode="bilinear"),
    "bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
    "convolution": lambda: nn.Conv2d(4, 4, 5, padding=2),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1),
    "linear": lambda: nn.Linear(16, 16),
    "matmul over the cut": lambda: Call(lambda x: x.transpose(-1, -2) @ x),
    "matmul of the cut": lambda: Call(lambda x: x @ x.transpose(-1, -2)),
    "attention over the cut": lambda: Call(lambda x: F.scaled_dot_product_attention(x, x, x)),
    "attention": lambda: Call(lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3)),
}
CHANNELS = {"pangu": (7, 5)}


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in OPERATORS:
        return OPERATORS[name](), torch.randn(2, 4, 19, 16)
    channels, model = CHANNELS.get(name, (5, 3)), load_model_class(MODELS[name].path)
    made = model(*channels, (19, 16), **SMALL[name])
    for parameter in made.parameters():  # none is zero, so that every gradient counts
        if not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.1)
    return made, torch.randn(2, channels[0], 19, 16)


def results(model: nn.Module, x: Tensor, precision: str) -> tuple[dict[str, Tensor], Tensor]:
    """The output, the gradient of the input and those of all parameters; and the cotangent."""
    x = x.clone().requires_grad_()
    with PRECISIONS[precision]():
        y = model(x)
        cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (y * cotangent.to(y.dtype)).sum().backward()
    return found_in(model, x, y), cotangent


def found_in(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


def sharded(model: nn.Module, x: Tensor, precision: str, cotangent: Tensor) -> dict[str, Tensor]:
    """As `results`, from ranks that each have some rows."""

    def on_rank() -> tuple[bool, dict[str, Tensor]]:
        manager = get_domain_parallel_manager()
        ours = convert_to_domain_parallel(copy.deepcopy(model), manager, custom_converters=DOMAIN_CONVERTERS)
        mine = shard_tensor(x, -2, manager).clone().requires_grad_()
        with PRECISIONS[precision]():
            y = ours(mine)
            is_whole = y.shape == cotangent.shape
            part = cotangent if is_whole else shard_tensor(cotangent, -2, manager)
            (y * part.to(y.dtype)).sum().backward()
        return is_whole, found_in(ours, mine, y)

    with thread_ranks(RANKS) as world:
        by_rank = world.run(on_rank)
    is_whole, first = by_rank[0]
    parts = {name: [found[name] for _, found in by_rank] for name in first}
    found = {name: torch.stack(one).sum(0) for name, one in parts.items() if name not in ("output", "input")}
    output = first["output"] if is_whole else torch.cat(parts["output"], -2)
    return {"output": output, "input": torch.cat(parts["input"], -2), **found}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative to float64, of the output, of the gradient of the input, and of those of parameters together: of a few
    numbers alone, it is chance."""
    assert found.keys() == wanted.keys()
    each = {name: float((found[name].double() - x).norm() / x.norm()) for name, x in wanted.items()}
    together = {name: each.pop(name) for name in ("output", "input")}
    return together | {"parameters": (sum(e**2 for e in each.values()) / len(each)) ** 0.5} if each else together


CASES = [
    pytest.param(name, precision, marks=pytest.mark.slow if name in MODELS and precision == "tf32" else ())
    for name in [*OPERATORS, *MODELS]
    for precision in ("bf16", "tf32")
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_no_further_from_float64_than_plain(name: str, precision: str) -> None:
    model, x = model_of(name)
    wanted, cotangent = results(copy.deepcopy(model).double(), x.double(), "float64")
    plain = errors(results(copy.deepcopy(model), x, precision)[0], wanted)
    ours = errors(sharded(model, x, precision, cotangent), wanted)
    further = {key: (ours[key], one) for key, one in plain.items() if not ours[key] <= max(FACTOR * one, ROUNDING)}
    assert not further
