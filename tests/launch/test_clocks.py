"""The clock of rank 0 counts, whatever the others' say."""

from __future__ import annotations

import time

import pytest

from credit.errors import LaunchError
from credit.launch.job import _clocks
from credit.layout import Seat
from credit.stop import StopRequest


def clocks_with_rank_1_ahead(by: float) -> tuple[list[float], bool, bool]:
    """What is said of the clocks, and whether a job of which a minute is left stops by them: corrected, and not."""
    import torch.distributed as dist

    true = time.time
    if dist.get_rank() == 1:
        time.time = lambda: true() + by  # type: ignore[method-assign]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CREDIT_STOP_AT", str(true() + 60))
            request, naive = StopRequest(), StopRequest()
            ahead = _clocks([Seat("a", "cpu"), Seat("b", "cpu")])
            request.clock_ahead = ahead[dist.get_rank()]
            return ahead, bool(request), bool(naive)
    finally:
        time.time = true  # type: ignore[method-assign]


def test_a_clock_that_is_ahead_does_not_stop_the_job(worlds) -> None:
    first, second = worlds(2).run(clocks_with_rank_1_ahead, 3600.0)
    assert first == ([0.0, pytest.approx(3600, abs=20)], False, False)
    assert second == ([0.0, pytest.approx(3600, abs=20)], False, True)


def test_clocks_that_are_about_the_same_are_left_alone(worlds) -> None:
    assert [ahead for ahead, _, _ in worlds(2).run(clocks_with_rank_1_ahead, 1.0)] == [[0.0, 0.0]] * 2


def test_a_time_that_is_up_is_said_with_both_clocks(monkeypatch) -> None:
    monkeypatch.setenv("CREDIT_STOP_AT", "1000000000")
    with pytest.raises(LaunchError, match=r"it is 2001-09-09T01:46:40Z, and the clock of \S+ says 20\d\d-"):
        StopRequest().refuse_too_late()
    monkeypatch.setenv("CREDIT_STOP_AT", "noon")
    with pytest.raises(LaunchError, match="CREDIT_STOP_AT is 'noon'"):
        StopRequest()
