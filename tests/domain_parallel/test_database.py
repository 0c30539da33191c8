"""Every operator that torch knows, by torch's own samples: exact, or refused in words where the docs say so."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

from credit.domain_parallel.slab import Slab
from credit.domain_parallel.thread_ranks import ThreadWorld, thread_ranks
from credit.parallel.channels import Channels
from tests.domain_parallel import database

PARTS = 6
REFUSED = {"as_strided", "resize_", "resize_as_", "squeeze", "unsqueeze", "transpose", "t", "swapaxes", "swapdims"}
"""Operators some calls of which cannot be exact: strides of one device's memory, other shapes in place."""


def verdicts(
    world: ThreadWorld, dtype: torch.dtype, part: int, parts: int, samples: int | None, kind: type[Slab] = Slab
) -> Counter:
    """Of every `parts`-th operator; fails with what is wrong. Channels may refuse anything: they do not move."""
    logging.getLogger("credit").setLevel(logging.ERROR)
    total: Counter = Counter()
    wrong: list[str] = []

    def seen(call: database.Call, place: int, axis: int, found: str) -> None:
        may_refuse = kind is Channels or call.name.partition(".")[0] in REFUSED
        allowed = found == "exact" or (found.startswith("refused") and may_refuse)
        if not allowed:
            wrong.append(f"{call.name}, leaf {place} axis {axis}: {found}")

    for op in database.operators(dtype)[part::parts]:
        total += database.judge(op, world, dtype, samples, seen, kind)
    assert not wrong, "\n".join(wrong[:20])
    return total


@pytest.mark.parametrize("part", range(PARTS))
def test_an_operator_of_torch_is_exact(part: int) -> None:
    with thread_ranks(3) as world:
        assert verdicts(world, torch.float64, part, PARTS, 1)["exact"] > 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_in_other_types_on_a_slice(dtype: torch.dtype) -> None:
    with thread_ranks(2) as world:
        assert verdicts(world, dtype, 3, 12, 1)["exact"] > 100


@pytest.mark.parametrize(
    ("parts", "samples", "least"), [(6, 1, 100), pytest.param(1, None, 5000, marks=pytest.mark.slow)]
)
def test_an_operator_on_channels_is_exact_or_refused(parts: int, samples: int | None, least: int) -> None:
    with thread_ranks(2) as world:
        assert verdicts(world, torch.float64, 0, parts, samples, Channels)["exact"] > least


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_sample(ranks: int) -> None:
    with thread_ranks(ranks) as world:
        assert verdicts(world, torch.float64, 0, 1, None)["exact"] > 50_000


@pytest.mark.parametrize("largest", [10**6, pytest.param(10**9, marks=pytest.mark.slow)])
def test_what_torch_refuses_is_refused_as_torch_does_on_every_rank(largest: int) -> None:
    """Its error inputs, of which a tensor is cut where it can be. One has an axis of 2**24, planned for a minute."""
    logging.getLogger("credit").setLevel(logging.ERROR)
    seen, other = 0, []
    with thread_ranks(2) as world:
        for op in database.operators(torch.float64):
            if op.error_inputs_func is None:
                continue
            for call in database.error_calls_of(op):
                if any(isinstance(x, torch.Tensor) and x.numel() > largest for x in call.leaves):
                    continue
                theirs = database.run_plain(call)
                for place, axis in list(database.cuts_of(call, world.size))[:2]:
                    seen += theirs.error is not None
                    found = database.verdict(world, call, place, axis, theirs, 1e-9)
                    if not found.startswith(("exact", "refused")):
                        other.append(f"{call.name}, leaf {place} axis {axis}: {found}")
    assert not other, "\n".join(other[:20])
    assert seen > 300
