"""Names of the reference API that programs import: exact, or the import says what to use instead."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel, gather_tensor, shard_tensor
from credit.domain_parallel.thread_ranks import thread_ranks
from credit.errors import CreditError
from credit.parallel import domain, parse_parallelism_conf
from credit.parallel.elsewhere import INSTEAD
from credit.parallel.fsdp2 import apply_fsdp2, fsdp2_is_applied
from credit.parallel.tensor_parallel import (
    TensorParallelError,
    TpColConv2d,
    TpColLinear,
    TpRowConv2d,
    TpRowLinear,
    apply_tensor_parallel,
)
from tests.domain_parallel.parity import manager, relative

ALONE = SimpleNamespace(domain_parallel_size=1)
"""What programs for one device hand in for a manager."""


def there_and_back() -> list[float]:
    """Errors of the fields, and of the gradient that comes back through gathering them."""
    torch.manual_seed(0)
    whole = torch.randn(2, 3, 13, 4, dtype=torch.float64)
    mine = domain.shard_spatial({"x": whole, "more": [whole[0]]}, manager())
    again = domain.gather_spatial(mine, manager())
    rows = shard_tensor(whole, -2, manager()).requires_grad_()
    (domain.gather_spatial(rows, manager()) ** 3).sum().backward()
    gradient = manager().domain_world_size * 3 * shard_tensor(whole, -2, manager()) ** 2
    return [relative(again["x"], whole), relative(again["more"][0], whole[0]), relative(rows.grad, gradient)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_gathered_fields_are_those_that_were_sharded(ranks) -> None:
    with thread_ranks(ranks) as world:
        assert max(map(max, world.run(there_and_back))) < 1e-15


def weighted() -> list[float]:
    """Errors of the global mean of weighted rows, by each shape that weights come in."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 13, 4, dtype=torch.float64)
    by_row = torch.cos(torch.linspace(-1.5, 1.5, 13, dtype=torch.float64))
    errors = []
    for weights in (by_row, by_row[:, None], by_row[None, None, :, None].expand(1, 1, 13, 4)):
        columns = weights if weights.ndim > 1 else weights[:, None]
        mine = domain.shard_lat_weights(weights, manager())
        mine = mine if mine.ndim > 1 else mine[:, None]
        share = (shard_tensor(x, -2, manager()) * mine).sum() / x.numel()
        errors.append(relative(manager().group.all_reduce(share), (x * columns).mean()))
    return errors


@pytest.mark.parametrize("ranks", [2, 5])
def test_rows_of_weights_give_the_global_mean(ranks) -> None:
    with thread_ranks(ranks) as world:
        assert max(map(max, world.run(weighted))) < 1e-14
    with pytest.raises(TypeError, match="not a MSELoss"):
        domain.shard_lat_weights(nn.MSELoss(), None)


class Padded:
    pad_lat = (2, 1)
    pad_lon = 3


def padding_of_attributes() -> float:
    torch.manual_seed(0)
    field = torch.randn(1, 2, 16, 18, dtype=torch.float64)
    found = domain.unpad_shard_interp(shard_tensor(field, -2, manager()), Padded(), manager(), 13, 12)
    return relative(gather_tensor(found, -2, manager()), field[..., 2:-1, 3:-3])


def test_padding_is_told_by_attributes_too() -> None:
    with thread_ranks(3) as world:
        assert max(world.run(padding_of_attributes)) == 0
    with pytest.raises(DomainParallelError, match="neither unpad"):
        domain.unpad_shard_interp(torch.zeros(1, 1, 4, 4), object(), None, 4, 4)


def test_a_manager_may_have_its_size_alone_if_that_is_one() -> None:
    x, model = torch.arange(8.0).reshape(1, 1, 4, 2), nn.Conv2d(1, 1, 3, padding=1)
    assert convert_to_domain_parallel(model, ALONE) is model
    for function in (domain.shard_spatial, domain.gather_spatial, domain.shard_lat_weights):
        assert function(x, ALONE) is x
    assert shard_tensor(x, -2, ALONE) is x
    assert torch.equal(domain.unpad_shard_interp(x, None, ALONE, 4, 2), x)
    domain.sync_domain_gradients(model, ALONE)
    two = SimpleNamespace(domain_parallel_size=2)
    for call in (
        lambda: domain.shard_spatial(x, two),
        lambda: convert_to_domain_parallel(model, two),
        lambda: domain.sync_domain_gradients(model, two),
    ):
        with pytest.raises(DomainParallelError, match="a SimpleNamespace of domain_parallel_size 2 has no ranks"):
            call()


class Block(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._tp_col, self._tp_row = "first", "second"

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Own(nn.Linear):
    """A user's own kind of linear layer."""


def cut_and_sharded() -> list[float]:
    """Errors over processes, with the classes that layers have afterwards, and FSDP2's."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = [
        (Block(nn.Linear(4, 8), Own(8, 4)), (3, 4), (TpColLinear, TpRowLinear)),
        (Block(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)), (2, 4, 5, 3), (TpColConv2d, TpRowConv2d)),
    ]
    errors = []
    for plain, shape, kinds in cases:
        x = torch.randn(shape, dtype=torch.float64)
        block = apply_tensor_parallel(copy.deepcopy(plain).double(), mesh)
        for layer, kind in zip((block.first, block.second), kinds, strict=True):
            others = {TpColLinear, TpColConv2d, TpRowLinear, TpRowConv2d} - {kind}
            assert isinstance(layer, kind)
            assert not isinstance(layer, tuple(others))
        errors.append(relative(block(x), plain.double()(x)))
    assert isinstance(cases[0][0].second, Own)
    model = nn.Sequential(nn.Linear(4, 4))
    assert not fsdp2_is_applied(model)
    assert fsdp2_is_applied(nn.ModuleList([apply_fsdp2(model, mesh, {})]))
    return errors


def test_layers_that_are_cut_have_the_names_of_the_reference(worlds) -> None:
    assert max(map(max, worlds(2).run(cut_and_sharded))) < 1e-14
    for kind in (TpColLinear, TpColConv2d, TpRowLinear, TpRowConv2d):
        with pytest.raises(TensorParallelError, match=f"{kind.__name__} is what apply_tensor_parallel makes"):
            kind(nn.Linear(2, 2), None)


def test_a_config_without_the_block_is_one_device_and_a_block_by_itself_is_refused() -> None:
    one = {"data": "none", "tensor": 1, "domain": 1}
    assert parse_parallelism_conf({"trainer": {"epochs": 1}}) == parse_parallelism_conf({}) == one
    with pytest.raises(ValueError, match="give the whole config"):
        parse_parallelism_conf({"parallelism": {"data": "ddp", "tensor": 1, "domain": 4}})


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in INSTEAD.items() for name in names])
def test_a_name_that_is_not_here_says_what_to_use(module, name) -> None:
    with pytest.raises(ImportError, match=f"{name} of the reference API is not here; use ") as caught:
        exec(f"from {module} import {name}")
    assert isinstance(caught.value, CreditError)
    instead = INSTEAD[module][name].partition(":")[0]
    if instead.isidentifier():
        assert hasattr(importlib.import_module(module), instead)
    with pytest.raises(AttributeError):
        getattr(importlib.import_module(module), "no_such_name")  # noqa: B009
