"""Gradients that neither DDP nor FSDP2 averages are so while the backward runs: the same bits, earlier."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from credit.errors import CreditError
from credit.models import DOMAIN_CONVERTERS
from credit.parallel import collectives, shard_spatial
from credit.parallel.collectives import GradientSums, local
from credit.parallel.fsdp2 import synchronize_gradients
from credit.parallel.mesh import build_device_mesh
from credit.parallel.parallelize import Gradients, parallelize, reduce_gradients
from tests.parallel.curves import MODELS, conf, data, layout
from tests.ranks import RankError

LAYOUTS = {
    "none, 4 domain ranks": ("none", 1, 4),
    "ddp, for 2 tensor ranks": ("ddp", 2, 1),
    "fsdp2 over dp, for 2 domain ranks": ("fsdp2 over dp", 1, 2),
}


def gradients(name: str, given: dict[str, Any], bucket_bytes: int, early: bool) -> tuple[dict[str, Tensor], list[int]]:
    """Of one step, and the number of buckets under way at each gradient, at the end of the backward, and at the end."""
    parallelism = given["trainer"]["parallelism"]
    mesh, manager = layout("none" if parallelism["data"] == "none" else "ddp", *[*parallelism.values()][1:])
    torch.manual_seed(0)
    model = parallelize(MODELS[name]().double(), mesh, given, manager, DOMAIN_CONVERTERS)
    x = shard_spatial(data(0)[0][2 * dist.get_rank() :][:2] if manager.domain_world_size == 1 else data(0)[0], manager)
    under_way = []

    def note(_: Tensor) -> None:
        under_way.append(ours.started)

    note.__module__ = Gradients.__module__  # others' hooks may not see a rank's part of a gradient
    with patch.object(collectives, "BUCKET_BYTES", bucket_bytes), ExitStack() as hooks:
        ours = Gradients(model, mesh, given)
        for parameter in model.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(note).remove)
        for _ in range(2):  # the second step goes by what came when in the first
            under_way.clear()
            model.zero_grad()
            with torch.no_grad():
                model(x)  # after which FSDP2 leaves some parameters gathered
            for last in (False, True):
                with ours.adding_up(last) if early else synchronize_gradients(model, last):
                    model(x).square().mean().backward()
            under_way.append(ours.started)
            if early:
                ours.reduce()
            else:
                reduce_gradients(model, mesh, given)
            under_way.append(ours.started)
    return {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}, under_way


def compared(*given: Any) -> tuple[list[str], list[int]]:
    """Parameters whose gradients differ, early and late; and how many buckets were under way."""
    (early, under_way), (late, _) = gradients(*given, early=True), gradients(*given, early=False)
    assert early.keys() == late.keys()
    return [name for name in late if not torch.equal(early[name], late[name])], under_way


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", LAYOUTS)
def test_the_same_bits_while_the_backward_runs(worlds, name: str, how: str) -> None:
    mode, tp, domain = LAYOUTS[how]
    for different, under_way in worlds(4).run(compared, name, conf(mode, tp, domain), 2000):
        assert not different
        *at_each, at_end, in_all = under_way
        assert in_all > 3
        assert at_end == in_all  # all were started by gradients that came
        assert any(0 < number < in_all for number in at_each)


def second_gradient() -> None:
    weight = nn.Parameter(torch.ones(3))

    def scaled(x: Tensor) -> Tensor:
        return x * weight

    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        x = checkpoint(scaled, x, use_reentrant=True)
    with GradientSums([weight], dist.group.WORLD).as_they_come():  # type: ignore[arg-type]
        x.sum().backward()


def test_a_second_gradient_after_the_first_was_sent_is_refused(worlds) -> None:
    with pytest.raises(RankError, match=r"a parameter of shape \(3,\) got a second gradient in one backward") as caught:
        worlds(2).run(second_gradient)
    assert {type(error) for error in caught.value.errors.values()} == {CreditError}


def started_after_validation() -> int:
    given = conf("fsdp2 over dp x domain", 1, 2)
    mesh, manager = layout("ddp", 1, 2)
    model = parallelize(MODELS["convnet"]().double(), mesh, given, manager, DOMAIN_CONVERTERS)
    ours, x = Gradients(model, mesh, given), shard_spatial(data(0)[0], manager)
    with torch.no_grad():
        model(x)
    with ours.adding_up(last=True):
        model(x).square().mean().backward()
    return ours.started


def test_parameters_that_validation_leaves_gathered_are_fsdp2s(worlds) -> None:
    assert worlds(2).run(started_after_validation) == [0, 0]


def runs_of_which_one_rank_keeps_the_first() -> None:
    kept = []
    for _ in range(2):
        mesh, _ = build_device_mesh({"data": "none", "tensor": 1, "domain": 2}, "cpu")
        Gradients(nn.Linear(2, 2), mesh, conf("none", 1, 2))
        kept.append(mesh if dist.get_rank() == 1 else None)
        del mesh
        gc.collect()


def test_what_a_rank_still_holds_of_an_earlier_run_changes_nothing(worlds) -> None:
    """Meshes that are equal are not one: a rank that found the earlier one's groups made none, and its peer waited."""
    worlds(2).run(runs_of_which_one_rank_keeps_the_first, timeout=100)
