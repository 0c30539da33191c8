"""torch.compile around, and inside, a converted model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from credit.domain_parallel import convert_to_domain_parallel, shard_tensor, verify_parity
from tests.domain_parallel import parity


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.pointwise = nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 1), nn.GELU())
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pointwise(self.first(x)) - x.mean(-2, keepdim=True).sum(1, keepdim=True))


@torch.compile(backend="aot_eager", fullgraph=True)
def anomaly(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-2, keepdim=True).cumsum(1)


class OfCompiledFunction(nn.Module):
    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.conv, self.recomputed = nn.Conv2d(2, 2, 3, padding=1), recomputed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return checkpoint(anomaly, x, use_reentrant=False) if self.recomputed else anomaly(x)


def compiled_errors(inside: bool) -> dict[str, float]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    plain = Blocks().double()
    sharded = convert_to_domain_parallel(copy.deepcopy(plain), parity.manager())
    if inside:
        sharded.pointwise.compile(backend="aot_eager")
        compiled = sharded
    else:
        compiled = torch.compile(sharded, backend="aot_eager")
    found = {}
    for height in (13, 17):
        x = torch.randn(1, 2, height, 6, dtype=torch.float64)
        y = plain(x)
        ours = compiled(shard_tensor(x, -2, parity.manager()))
        found[f"output {height}"] = parity.relative(ours, shard_tensor(y, -2, parity.manager()))
        plain.zero_grad()
        sharded.zero_grad()
        y.sum().backward()
        ours.sum().backward()
        for (name, a), b in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            total = a.grad.clone()
            torch.distributed.all_reduce(total)
            found[f"{name} {height}"] = parity.relative(total, b.grad)
    return found


def test_a_compiled_model_gives_the_same_numbers(worlds) -> None:
    for errors in worlds(2).run(compiled_errors, False):
        assert max(errors.values()) < 1e-9, errors


def test_a_part_compiled_by_itself_gives_the_same_numbers(worlds) -> None:
    for errors in worlds(2).run(compiled_errors, True):
        assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_function_in_a_forward_gives_the_same_numbers(recomputed) -> None:
    assert verify_parity(OfCompiledFunction(recomputed), (torch.randn(1, 2, 13, 6),), ranks=3).exact
