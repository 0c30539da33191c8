"""What cannot be done exactly stops on every rank, with the module, the line of its code, and the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel, shard_tensor
from credit.domain_parallel.thread_ranks import RankError
from tests.domain_parallel import parity
from tests.domain_parallel.operators import Call


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def descended(x: Tensor) -> Tensor:
    """A step down the energy of a copy."""
    y = x.detach().requires_grad_()
    y.square().sum().backward()
    return x - y.grad


FUNCTIONS = {
    "a backward inside": descended,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "row.numpy": lambda x: torch.from_numpy(x[:, :, 3].detach().numpy()),
    "_foreach_mul_": lambda x: torch._foreach_mul_([x.data[:, :, 3], x.data], 2.0),
    "as_strided": lambda x: torch.as_strided(x, (4, 4), (1, 4)),
    "squeeze_": lambda x: (x[:, :1] * 1).squeeze_(1),
    "autograd.grad": lambda x: torch.autograd.grad(x.sum(), x)[0],
    "use_reentrant=False": lambda x: checkpoint(torch.tanh, x, use_reentrant=True) * 1,
    "torch._make_dual": lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "aten": scripted,
}


def run(name: str) -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Conv2d(4, 4, 3), Call(FUNCTIONS[name]))})
    model.forward = lambda x: model["blocks"](x)  # type: ignore[method-assign]
    convert_to_domain_parallel(model["blocks"], parity.manager())
    x = shard_tensor(torch.randn(2, 4, 13, 6), -2, parity.manager())
    model(x).sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_cannot_be_exact_is_refused_with_module_line_and_remedy(threads, name) -> None:
    with pytest.raises(RankError) as caught:
        threads(2).run(run, name)
    assert {type(error) for error in caught.value.errors.values()} == {DomainParallelError}
    assert len(caught.value.errors) == 2
    first, second = (str(error) for error in caught.value.errors.values())
    assert first == second
    assert "1 (Call)" in first
    assert "test_refusals.py" in first or "operators.py" in first
    assert name in first or name.split(" ")[-1] in first or name.split(".")[-1] in first


def differing_generators(train: bool) -> bool:
    model = convert_to_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Dropout(0.5)), parity.manager())
    torch.manual_seed(parity.manager().domain_rank)
    model.train(train)(shard_tensor(torch.randn(2, 1, 13, 6), -2, parity.manager()))
    return True


def test_random_numbers_that_differ_between_ranks_are_refused_where_they_are_drawn(threads) -> None:
    assert threads(2).run(differing_generators, False) == [True, True]
    with pytest.raises(RankError, match=r"draws random numbers .* torch\.manual_seed") as caught:
        threads(2).run(differing_generators, True)
    assert len(caught.value.errors) == 2
