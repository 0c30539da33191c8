"""Failing together, and gradients averaged over the domain."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from credit.errors import CreditError, DataError, UnforeseenError
from credit.models.unet import UNet
from credit.parallel import (
    apply_fsdp2,
    apply_tensor_parallel,
    build_device_mesh,
    collectives,
    get_domain_manager,
    get_raw_model,
    shard_spatial,
)
from credit.parallel.collectives import sync_domain_gradients, together
from credit.parallel.domain import apply_domain_parallel
from credit.parallel.fsdp2 import apply_ddp
from credit.parallel.meters import Wire
from credit.parallel.pieces import whole
from tests.domain_parallel import parity
from tests.ranks import RankError


def fail_on(ranks: list[int], kind: type[Exception]) -> None:
    with together("reading"):
        if dist.get_rank() in ranks:
            raise kind("no such file")


def test_one_rank_fails_and_all_know_why(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(3).run(fail_on, [1], DataError)
    assert [str(error) for error in caught.value.errors.values()] == ["reading failed on rank 1: no such file"] * 3
    assert {type(error) for error in caught.value.errors.values()} == {CreditError}


def test_an_error_of_all_ranks_is_said_once(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(3).run(fail_on, [0, 1, 2], DataError)
    assert [str(error) for error in caught.value.errors.values()] == ["no such file"] * 3


def test_an_unexpected_error_is_told_to_peers_with_its_type_and_place(worlds) -> None:
    with pytest.raises(RankError) as caught:
        worlds(2).run(fail_on, [0], ZeroDivisionError)
    for error in caught.value.errors.values():
        assert type(error) is UnforeseenError
        assert f"reading failed on rank 0: ZeroDivisionError: no such file ({__file__}:" in str(error)


def test_no_failure_is_no_failure(worlds) -> None:
    worlds(2).run(fail_on, [], DataError)


def averaged(bucket_bytes: int) -> tuple[list[list[float]], int]:
    """Gradients of rank + 1, one parameter without a gradient on rank 0, in buckets of two dtypes; and how many sums
    it took."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(4)])
    model.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for i, parameter in enumerate(model):
        if not (i == 1 and dist.get_rank() == 0):
            parameter.grad = torch.full_like(parameter, (dist.get_rank() + 1) * 10**i)
    with patch.object(collectives, "BUCKET_BYTES", bucket_bytes), Wire() as wire:  # these ranks go on to other tests
        sync_domain_gradients(model, parity.manager())
    return [parameter.grad.tolist() for parameter in model], wire.names["allreduce_"]


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 5), (24, 3), (25 * 2**20, 2)])
def test_gradients_are_averaged_over_the_domain(worlds, bucket_bytes: int, buckets: int) -> None:
    for found, sums in worlds(2).run(averaged, bucket_bytes):
        assert found == [[1.5] * 3, [10.0] * 3, [150.0] * 3, [1500.0] * 3, [15000.0] * 2]
        assert sums == buckets


def clipped(order: float) -> tuple[float, list[float], torch.dtype, str]:
    """The norm of two whole gradients, their values afterwards, its type; and what none at all gives."""
    ours = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    ours[0].grad, ours[1].grad = torch.arange(3.0) - 4, torch.tensor([2.0, -7.0])
    norm = collectives.clip_grad_norm_(ours, 1.5, order)
    none = collectives.clip_grad_norm_([nn.Parameter(torch.zeros(3))], 1.5)
    nothing = collectives.clip_grad_norm_([], 1.5)
    assert float(nothing) == 0
    ours[0].grad[0] = float("nan")
    try:
        collectives.clip_grad_norm_(ours, 1.5, order, error_if_nonfinite=True)
    except RuntimeError as error:
        return float(norm), [*ours[0].grad.tolist()[1:], *ours[1].grad.tolist()], norm.dtype, f"{float(none)} {error}"
    raise AssertionError("a norm that is not finite is no error")


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(worlds, order: float) -> None:
    theirs = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    theirs[0].grad, theirs[1].grad = torch.arange(3.0) - 4, torch.tensor([2.0, -7.0])
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 1.5, order)
    for norm, values, kind, said in worlds(2).run(clipped, order):
        assert norm == pytest.approx(float(wanted), rel=1e-6)
        assert values == pytest.approx([*theirs[0].grad.tolist()[1:], *theirs[1].grad.tolist()], rel=1e-6)
        assert kind == wanted.dtype
        assert said.startswith("0.0 The total norm of order ")


def by_the_pieces(data: str) -> dict[str, list[float]]:
    """Gradients of a model that is laid out by hand, in the order that the docstring of `credit.parallel` shows, with
    one replica; whole."""
    conf = {"trainer": {"parallelism": {"data": data, "tensor": 1, "domain": 2}}}
    mesh, submeshes = build_device_mesh(conf["trainer"]["parallelism"], "cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = apply_domain_parallel(model, submeshes.get("domain"))
    manager = get_domain_manager(model)
    model = apply_fsdp2(model, submeshes.get("dp"), conf) if data == "fsdp2" else apply_ddp(model, submeshes.get("dp"))
    rows = shard_spatial(x, manager)
    (2 * model(rows).square().sum()).backward()
    sync_domain_gradients(model, manager)
    assert mesh is not None
    named = get_raw_model(model).named_parameters()
    return {name: whole(p.grad).flatten().tolist() for name, p in named}


@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
def test_the_pieces_one_by_one_give_the_gradients_of_one_device(worlds, data: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).double()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    for found in worlds(2).run(by_the_pieces, data):
        for name, parameter in model.named_parameters():
            assert found[name] == pytest.approx(parameter.grad.flatten().tolist(), rel=1e-9, abs=1e-12)


def cut_and_replicated() -> None:
    mesh, submeshes = build_device_mesh({"data": "ddp", "tensor": 2, "domain": 1}, "cpu")
    model = UNet(2, 2, (8, 8), width=8, levels=1)
    block = nn.Module()
    block.first, block.second = nn.Linear(4, 4), nn.Linear(4, 4)
    block._tp_col, block._tp_row = "first", "second"
    model.add_module("block", block)
    assert mesh is not None
    apply_ddp(apply_tensor_parallel(model, submeshes["tp"]), submeshes.get("dp"))


def test_ddp_of_a_model_that_is_cut_by_channel_is_refused_in_words(worlds) -> None:
    with pytest.raises(RankError, match=r"block.first.weight is cut over tensor-parallel ranks, and DDP takes no such"):
        worlds(2).run(cut_and_replicated)
