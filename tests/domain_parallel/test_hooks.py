"""Hooks are given on ranks what they are given on one device, or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel, shard_tensor, verify_parity
from credit.domain_parallel.slices import slices
from credit.domain_parallel.thread_ranks import RankError
from tests.domain_parallel import parity


def unit(grad: Tensor) -> Tensor:
    return grad / (grad.norm() + 1)


def of_nothing(x: Tensor) -> None:
    """Registers nothing."""


class Hooked(nn.Module):
    """Hooks in its forward, on a field, on its mean over the globe or on a row of it."""

    def __init__(
        self,
        on_mean: Callable[[Tensor], Any] = of_nothing,
        on_row: Callable[[Tensor], Any] = of_nothing,
        on_field: Callable[[Tensor], Any] = of_nothing,
    ) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.on_mean, self.on_row, self.on_field = on_mean, on_row, on_field

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.on_field(y)
        mean, row = y.mean((2, 3)), y[:, :, 3]
        self.on_mean(mean)
        self.on_row(row)
        return y * self.linear(mean)[:, :, None, None] + row.unsqueeze(2)


def hook(x: Tensor) -> None:
    x.register_hook(unit)


def hook_in_a_mode(x: Tensor) -> None:
    """Whatever mode is on sees the call first, as that of torch.device does."""
    with torch.device("cpu"):
        hook(x)


@pytest.mark.parametrize("how", [hook, hook_in_a_mode])
@pytest.mark.parametrize("place", ["on_field", "on_mean", "on_row"])
def test_a_hook_is_given_the_whole_gradient(place, how) -> None:
    assert verify_parity(Hooked(**{place: how}), (torch.randn(2, 4, 13, 6),), ranks=3).exact


def hooked_root() -> Hooked:
    model = Hooked()
    model.register_forward_pre_hook(lambda module, args: (args[0] / args[0].norm(),))
    model.register_forward_hook(lambda module, args, output: output - output.mean(2, keepdim=True))
    return model


def test_forward_hooks_of_the_outermost_module_are_given_whole_fields() -> None:
    assert verify_parity(hooked_root(), (torch.randn(2, 4, 13, 6),), ranks=3).exact


def hook_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(unit)


def parameters_hooked(converted_first: bool) -> float:
    plain = Hooked().double()
    sharded = copy.deepcopy(plain)
    hook_parameters(plain)
    if not converted_first:
        hook_parameters(sharded)
    convert_to_domain_parallel(sharded, parity.manager())
    if converted_first:
        hook_parameters(sharded)
    x = torch.randn(2, 4, 13, 6, dtype=torch.float64)
    plain(x).square().sum().backward()
    for _ in range(2):  # its hooks are made ready once
        sharded.zero_grad()
        sharded(shard_tensor(x, -2, parity.manager())).square().sum().backward()
    totals = [parity.manager().group.all_reduce(parameter.grad) for parameter in sharded.parameters()]
    return max(parity.relative(a, b.grad) for a, b in zip(totals, plain.parameters(), strict=True))


@pytest.mark.parametrize("converted_first", [True, False])
def test_hooks_of_parameters_are_given_whole_gradients(threads, converted_first) -> None:
    assert max(threads(3).run(parameters_hooked, converted_first)) < 1e-9


def test_a_removed_hook_of_the_outermost_module_is_not_called(threads) -> None:
    def removed() -> bool:
        model, calls = Hooked(), []
        handle = model.register_forward_hook(lambda *given: calls.append(given))
        convert_to_domain_parallel(model, parity.manager())
        x = shard_tensor(torch.randn(2, 4, 13, 6), -2, parity.manager())
        model(x)
        handle.remove()
        model(x)
        return len(calls) == 1

    assert all(threads(2).run(removed))


def late(what: str) -> None:
    model = Hooked()
    if what == "linear":
        model.linear.register_full_backward_hook(lambda *given: None)
    else:
        model.conv.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.clamp_(-1, 1))
    convert_to_domain_parallel(model, parity.manager())
    model(shard_tensor(torch.randn(2, 4, 13, 6), -2, parity.manager()))


@pytest.mark.parametrize("what", ["linear", "conv.weight"])
def test_hooks_that_would_see_a_part_of_a_gradient_are_refused(threads, what) -> None:
    with pytest.raises(RankError) as caught:
        threads(2).run(late, what)
    assert {type(error) for error in caught.value.errors.values()} == {DomainParallelError}
    assert all(str(error).startswith(what) for error in caught.value.errors.values())


def test_hooks_of_parameters_are_refused_on_slices() -> None:
    model = Hooked()
    hook_parameters(model)
    with slices(model, 2), pytest.raises(DomainParallelError, match=r"^conv\.weight: its hook"):
        model(torch.randn(2, 4, 13, 6))
