"""sharded == plain: output, input gradient and every parameter gradient. Runs on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelManager, convert_to_domain_parallel, shard_tensor
from credit.domain_parallel.manager import get_domain_parallel_manager, set_domain_parallel_manager
from credit.domain_parallel.thread_ranks import ThreadRanks

TOLERANCE = 1e-9
on_ranks = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
ranks = st.integers(2, 5)
"""For tests of generated cases: settings, and how many ranks."""

Convert = Callable[[nn.Module, DomainParallelManager], nn.Module]


def manager() -> DomainParallelManager:
    """Of one domain group of all ranks: those of a thread world, or processes."""
    found = get_domain_parallel_manager()
    return found if found is not None and isinstance(found.group, ThreadRanks) else _manager_of_processes()


@cache
def _manager_of_processes() -> DomainParallelManager:
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
    return shard_tensor(x, dim, manager()) if x.shape[dim] >= manager().domain_world_size else x


@dataclass
class Expected:
    """What the plain model makes of a whole field, and the converted one is to.

    Attributes:
        model: for ranks to copy and convert.
        x, cotangent, output, input_gradient: whole.
        gradients: of the parameters, by name.
    """

    model: Callable[[], nn.Module]
    x: Tensor
    cotangent: Tensor
    output: Tensor
    input_gradient: Tensor
    gradients: dict[str, Tensor]
    seed: int


def expected(
    model: nn.Module | Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Expected:
    """The plain model's side, run once.

    The cotangent is random: a mean would have near-uniform gradients, which hide misplaced rows.
    """

    def build() -> nn.Module:
        torch.default_generator.manual_seed(seed)  # two equal models; old-style weight_norm cannot be copied
        return (copy.deepcopy(model) if isinstance(model, nn.Module) else model()).to(dtype)

    plain = build()
    torch.default_generator.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.default_generator.manual_seed(seed + 1)  # what a model draws, both draw
    y = plain(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    gradients = {name: gradient(parameter) for name, parameter in plain.named_parameters()}
    return Expected(build, x.detach(), cotangent, y.detach(), x.grad, gradients, seed)


def departures(found: Expected, convert: Convert = convert_to_domain_parallel, dim: int = -2) -> dict[str, float]:
    """Relative errors, on this rank, of the converted model. Runs on ranks."""
    sharded = convert(found.model(), manager())
    x = shard_tensor(found.x, dim, manager()).requires_grad_()
    torch.default_generator.manual_seed(found.seed + 1)
    y = sharded(x)
    y.backward(rows_of(found.cotangent, dim))
    errors = {
        "output": relative(y, rows_of(found.output, dim)),
        "input gradient": relative(x.grad, shard_tensor(found.input_gradient, dim, manager())),
    }
    ours = dict(sharded.named_parameters())
    for name, theirs in found.gradients.items():
        errors[name] = relative(manager().group.all_reduce(gradient(ours.pop(name))), theirs)
    assert not ours, f"new parameter names: {list(ours)}"
    return errors


def errors(
    model: nn.Module | Callable[[], nn.Module],
    shape: tuple[int, ...],
    convert: Convert = convert_to_domain_parallel,
    dtype: torch.dtype = torch.float64,
    dim: int = -2,
    seed: int = 0,
) -> dict[str, float]:
    """`departures` from what the plain model gives on this rank, whole. Runs on ranks."""
    return departures(expected(model, shape, dtype, seed), convert, dim)


def case_errors(
    world: Any, kind: str, arguments: tuple, options: dict, shape: tuple[int, ...], seed: int = 0
) -> list[dict[str, float]]:
    """`departures` of torch.nn's layer `kind`, by rank."""
    torch.default_generator.manual_seed(seed)
    return world.run(departures, expected(getattr(nn, kind)(*arguments, **options), shape, seed=seed))


def check(found: list[dict[str, float]]) -> None:
    wrong = [{name: error for name, error in rank.items() if not error < TOLERANCE} for rank in found]
    assert not any(wrong), wrong
