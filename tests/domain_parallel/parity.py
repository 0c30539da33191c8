"""sharded == plain: output, input gradient and every parameter gradient. Runs on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelManager, convert_to_domain_parallel, shard_tensor
from credit.domain_parallel.manager import set_domain_parallel_manager

Convert = Callable[[nn.Module, DomainParallelManager], nn.Module]


@cache
def manager() -> DomainParallelManager:
    world = dist.get_world_size()
    return set_domain_parallel_manager(DomainParallelManager(world, world))


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite if the shapes differ, or what is not a number in one is in the other."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0


def gradient(parameter: Tensor) -> Tensor:
    """Zero where none came: of an empty batch."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def rows_of(x: Tensor, dim: int) -> Tensor:
    """This rank's rows of an output; the whole, where there are fewer rows than ranks."""
    return shard_tensor(x, dim, manager()) if x.shape[dim] >= dist.get_world_size() else x


def _two(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, nn.Module]:
    """Two equal models; old-style weight_norm cannot be copied."""
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        models.append(build())
    return models[0], models[1]


def errors(
    model: nn.Module | Callable[[], nn.Module],
    shape: tuple[int, ...],
    convert: Convert = convert_to_domain_parallel,
    dtype: torch.dtype = torch.float64,
    dim: int = -2,
    seed: int = 0,
) -> dict[str, float]:
    """Relative errors on this rank of `model` converted, against `model` on the whole field.

    The cotangent is random: a mean would have near-uniform gradients, which hide misplaced rows.
    """
    plain, twin = (model, copy.deepcopy(model)) if isinstance(model, nn.Module) else _two(model, seed)
    plain, sharded = plain.to(dtype), convert(twin.to(dtype), manager())
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.manual_seed(seed + 1)  # what a model draws, both draw
    y = plain(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    x_local = shard_tensor(x.detach(), dim, manager()).requires_grad_()
    torch.manual_seed(seed + 1)
    y_local = sharded(x_local)
    y_local.backward(rows_of(cotangent, dim))
    found = {
        "output": relative(y_local, rows_of(y, dim)),
        "input gradient": relative(x_local.grad, shard_tensor(x.grad, dim, manager())),
    }
    ours = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        total = gradient(ours.pop(name)).clone()
        dist.all_reduce(total)
        found[name] = relative(total, gradient(parameter))
    assert not ours, f"new parameter names: {list(ours)}"
    return found


def case_errors(kind: str, arguments: tuple, options: dict, shape: tuple[int, ...], seed: int = 0) -> dict[str, float]:
    """`errors` of torch.nn's layer `kind`."""
    torch.manual_seed(seed)
    return errors(getattr(nn, kind)(*arguments, **options), shape, seed=seed)
