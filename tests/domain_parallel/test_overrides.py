"""Every function that torch lets a tensor of one's own answer: exact, or refused where the docs say so."""

from __future__ import annotations

import logging

import pytest

from credit.domain_parallel.thread_ranks import thread_ranks
from tests.domain_parallel import overrides

REFUSED = ("share_memory_", "storage_offset", "swapaxes_", "swapdims_", "transpose_", "unsqueeze_", "squeeze_", ".t_")


@pytest.mark.parametrize(
    ("every", "ranks", "least"),
    [(5, 2, 1000), *(pytest.param(1, ranks, 8000, marks=pytest.mark.slow) for ranks in (2, 3))],
)
def test_a_function_gives_the_same_numbers(every: int, ranks: int, least: int) -> None:
    logging.getLogger("credit").setLevel(logging.ERROR)
    wrong: list[str] = []

    def seen(name: str, found: str) -> None:
        if found != "exact" and not (found.startswith("refused") and any(part in name for part in REFUSED)):
            wrong.append(f"{name}: {found}")

    with thread_ranks(ranks) as world:
        counts = overrides.judge(world, [], seen, every)
    assert not wrong, "\n".join(wrong[:20])
    assert counts["exact"] > least
