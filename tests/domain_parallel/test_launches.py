"""Operators launched and messages under computation are counted, and do not grow. What they are now: `launches`."""

from __future__ import annotations

import pytest
from torch import nn

from tests.domain_parallel.launches import compared, counted_here, overlap
from tests.domain_parallel.recordable import MODELS

MOST = {"unet": (369, 625), "unet_diffusion": (747, 1238), "wxformer": (3217, 2808), "pangu": (527, 675)}
"""Of a rank of two, in a forward and in a backward: those that remain. To be lowered with them."""


@pytest.mark.parametrize("name", MOST)
def test_a_rank_launches_no_more_than_it_did(name: str) -> None:
    for (direction, (_, rank)), most in zip(compared(name).items(), MOST[name], strict=True):
        assert rank.total() <= most, (direction, rank)


@pytest.mark.parametrize("kind", [nn.GroupNorm, nn.InstanceNorm2d])
def test_a_norm_over_all_rows_is_a_few_launches(threads, kind: type[nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(kind(2, 4) if kind is nn.GroupNorm else kind(4, affine=True))

    for forward, backward in threads(2).run(counted_here, build, (1, 4, 16, 8)):
        assert forward.total() <= 11 + 1, forward  # and the ranks' agreement at the start of a forward
        assert backward.total() <= 8, backward


@pytest.mark.parametrize("name", ["unet", "wxformer"])
def test_messages_of_a_recorded_step_are_under_computation(name: str) -> None:
    for share, operators in overlap(*MODELS[name]):
        assert share > 0.8
        assert operators > 5
