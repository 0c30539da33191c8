"""One loss curve on every mesh: losses, gradient norms and final parameters are those of one process, in float64.

`make test` leaves out large meshes on which a mode is another one by another name (`same_as`); on small ones it
shows that they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from credit.models import DOMAIN_CONVERTERS
from credit.parallel.meters import Wire
from credit.parallel.parallelize import Gradients, parallelize
from tests.parallel.curves import (
    MODELS,
    MODES,
    SHAPES,
    Transformer,
    compared,
    conf,
    curve,
    data,
    layout,
    same_as,
    serial,
)
from tests.ranks import RankError

CASES = [
    pytest.param(shape, mode, marks=pytest.mark.slow if max(shape) > 2 and same_as(mode, shape) != mode else ())
    for shape in SHAPES
    for mode in MODES
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("shape", "mode"), CASES, ids=lambda case: case if isinstance(case, str) else "x".join(map(str, case))
)
def test_every_mesh_gives_the_curve_of_one_process(worlds, name: str, shape: tuple[int, int, int], mode: str) -> None:
    dp, tp, domain = shape
    given = conf(mode, tp, domain)
    if mode == "none" and dp > 1:
        with pytest.raises(Exception, match="replicas, which data: none would train apart"):
            worlds(dp * tp * domain).run(curve, name, given)
        return
    for wrong in worlds(dp * tp * domain).run(compared, name, given, serial(name)):
        assert not wrong


OPTIONS = {
    "accumulate": {"accumulate": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "parameters stay gathered": {"reshard_after_forward": False},
    "prefetch": {"prefetch": 1},
}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2 over dp", "fsdp2 over dp x domain"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_save_memory_or_time_do_not_change_the_curve(worlds, mode: str, option: str) -> None:
    for shape in ((2, 1, 2), (2, 2, 1)):
        if same_as(mode, shape) != mode:
            continue
        given = conf(mode, *shape[1:], **OPTIONS[option])
        for wrong in worlds(4).run(compared, "transformer", given, serial("transformer")):
            assert not wrong


def reductions(given: dict[str, Any]) -> tuple[int, int]:
    """In one optimiser step: collectives that add gradients up, and other ones, which gather parameters."""
    mesh, manager = layout("ddp", 1, 1)
    model = parallelize(Transformer().double(), mesh, given, manager, DOMAIN_CONVERTERS)
    gradients = Gradients(model, mesh, given)
    x, _, _ = data(0)
    parts = given["trainer"].get("accumulate", 1)

    def step() -> None:
        for part in range(parts):
            with gradients.adding_up(part == parts - 1):
                model(x[:2]).square().mean().backward()
        gradients.reduce()

    step()
    step()  # DDP lays its buckets out anew after the first step
    with Wire() as wire:
        step()
    adding = sum(count for name, count in wire.names.items() if "reduce" in name)
    return adding, sum(wire.names.values()) - adding


@pytest.mark.parametrize("mode", ["ddp", "fsdp2 over dp"])
def test_accumulated_gradients_are_reduced_once(worlds, mode: str) -> None:
    once, twice = (worlds(2).run(reductions, conf(mode, 1, 1, accumulate=parts))[0] for parts in (1, 2))
    assert once[0] > 0
    assert twice[0] == once[0]
    assert twice[1] == 2 * once[1]


class Unused(Transformer):
    """With a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


MODELS_WITH_MORE = {"unused": Unused}


def test_a_parameter_without_a_gradient_stays_as_it_is(worlds) -> None:
    MODELS.update(MODELS_WITH_MORE)
    try:
        for mode, size in (("none", 2), ("fsdp2 over dp x domain", 2)):
            for wrong in worlds(size).run(compared_unused, conf(mode, 1, size), serial("unused")):
                assert not wrong
    finally:
        MODELS.pop("unused")


def compared_unused(given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    MODELS.update(MODELS_WITH_MORE)
    return compared("unused", given, wanted)


def with_batch_norm() -> None:
    mesh, manager = layout("ddp", 1, 1)
    parallelize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), mesh, conf("ddp", 1, 1), manager)


def test_batch_norm_over_replicas_is_refused_by_name(worlds) -> None:
    with pytest.raises(RankError, match=r"1 \(BatchNorm2d\) has the statistics of one replica's samples") as caught:
        worlds(2).run(with_batch_norm)
    assert len(caught.value.errors) == 2
