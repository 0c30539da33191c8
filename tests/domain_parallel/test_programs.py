"""Random programs: sharded == plain."""

from __future__ import annotations

import logging

import pytest

from credit.domain_parallel.thread_ranks import thread_ranks
from tests.domain_parallel import programs

EACH = 500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_a_random_program_gives_the_same_numbers(part: int) -> None:
    """Overlapping windows that are changed in place are left out: torch leaves open what comes of it."""
    logging.getLogger("credit").setLevel(logging.ERROR)
    seeds = range(part * EACH, (part + 1) * EACH)
    found = {seed: verdict for seed in seeds if (verdict := programs.verdict(seed, 2 + seed % 3)) != "exact"}
    wrong = {seed: verdict for seed, verdict in found.items() if not verdict.startswith("refused")}
    assert not wrong, "\n".join(f"{programs.described(seed)}\n{verdict}" for seed, verdict in [*wrong.items()][:3])
    assert len(found) <= EACH // 100, found


@pytest.mark.filterwarnings("ignore")
def test_a_random_program_on_channels_gives_the_same_numbers_or_is_refused() -> None:
    with thread_ranks(2) as world:
        found = {seed: programs.verdict_on_channels(seed, world) for seed in range(500)}
    wrong = {seed: verdict for seed, verdict in found.items() if not verdict.startswith(("refused", "exact"))}
    assert not wrong, "\n".join(f"{programs.described(seed)}\n{verdict}" for seed, verdict in [*wrong.items()][:3])
    assert sum(verdict == "exact" for verdict in found.values()) > 200
