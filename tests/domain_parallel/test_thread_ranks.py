"""Ranks as threads: the bits and the traffic of processes; what waits in vain is said at once; nothing is shared."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from credit.checks.parity import CutChannels
from credit.domain_parallel import (
    convert_to_domain_parallel,
    get_domain_parallel_manager,
    shard_tensor,
    verify_parity,
)
from credit.domain_parallel.groups import Alone, Messages, RankGroup
from credit.domain_parallel.thread_ranks import DeadlockError, RankError, ring_sum, thread_ranks
from credit.parallel.channels import ChannelGroup
from tests.domain_parallel import parity
from tests.domain_parallel.operators import OPERATORS, C, W


def group() -> RankGroup:
    return parity.manager().group


# Threads == processes


def bits_and_traffic(names: list[str], height: int, dtype: torch.dtype) -> dict[str, tuple]:
    """What operators give on this rank, and what they send."""
    found = {}
    for name in names:
        try:
            case = parity.expected(OPERATORS[name], (2, C, height, W), dtype)
        except (RuntimeError, ValueError, IndexError):
            continue
        model = convert_to_domain_parallel(case.model(), parity.manager())
        x = shard_tensor(case.x, -2, parity.manager()).requires_grad_()
        group().traffic.reset()
        torch.manual_seed(1)
        y = model(x)
        y.backward(parity.rows_of(case.cotangent, -2))
        numbers = [y, x.grad, *(parity.gradient(p) for p in model.parameters())]
        totals = [group().all_reduce(parity.gradient(p)) for p in model.parameters()]
        found[name] = (
            [t.detach().numpy().tobytes() for t in numbers + totals],
            dataclasses.replace(group().traffic),
        )
    return found


@pytest.mark.parametrize(("size", "dtype"), [(3, torch.float64), (4, torch.float32)])
def test_threads_give_the_bits_and_the_traffic_of_processes(worlds, threads, size: int, dtype: torch.dtype) -> None:
    names = list(OPERATORS)[:: 1 if size == 3 else 4]
    ours = threads(size).run(bits_and_traffic, names, 17, dtype)
    theirs = worlds(size).run(bits_and_traffic, names, 17, dtype)
    assert len(ours[0]) > len(names) * 0.9
    for rank in range(size):
        assert {name for name in ours[rank] if ours[rank][name] != theirs[rank][name]} == set()


def summed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(parity.manager().domain_rank)
    return group().all_reduce(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_sums_are_added_up_in_the_order_of_gloo(worlds, threads, size: int) -> None:
    for shape in [(), (1,), (7,), (3, 5), (64, 33), (2, 1001, 300)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            ours, theirs = threads(size).run(summed, shape, dtype), worlds(size).run(summed, shape, dtype)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (shape, dtype)


def maxima_and_rows() -> tuple:
    rank = parity.manager().domain_rank
    mine = torch.tensor([rank, -rank])
    return group().all_reduce(mine, "max").tolist(), group().all_gather(mine).tolist(), mine.tolist()


def test_maxima_and_gathered_values_are_those_of_processes(worlds, threads) -> None:
    ours = threads(3).run(maxima_and_rows)
    assert ours == worlds(3).run(maxima_and_rows)
    assert ours[1] == ([2, 0], [[0, 0], [1, -1], [2, -2]], [1, -1])


# Waiting in vain


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)])
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(torch.tanh(self.first(x)))
        return self.norm(x)


def without_a_message(number: int | None, normed: bool = True) -> None:
    """Forward and backward; in the exchange of that number rank 1 sends nothing."""
    model = Stem()
    model.norm = model.norm if normed else nn.Identity()
    model = convert_to_domain_parallel(model, parity.manager())
    x = shard_tensor(torch.randn(1, 2, 13, 4), -2, parity.manager()).requires_grad_()
    send, exchanges = group()._start, []

    def start(outgoing: dict, incoming: dict, like: torch.Tensor) -> Messages:
        exchanges.extend([outgoing] if outgoing else [])
        return send({} if len(exchanges) - 1 == number else outgoing, incoming, like)

    if parity.manager().domain_rank == 1:
        group()._start = start  # type: ignore[method-assign]
    model(x).square().sum().backward()


@pytest.mark.parametrize("number", [0, 1])
def test_a_dropped_message_is_a_deadlock_that_names_both_ranks_modules(threads, number: int) -> None:
    threads(2).run(without_a_message, None)
    began = time.monotonic()
    with pytest.raises(DeadlockError) as caught:
        threads(2).run(without_a_message, number)
    assert time.monotonic() - began < 1
    zero, one = str(caught.value).split("rank 1 waits ")
    assert "rank 0 waits for a message of rank 1, float32 [1, 2, 1, 4], in blocks.1 (Conv2d)" in zero
    assert "for the other ranks of (0, 1) in an all_gather of float32 [2, 1, 1, 1, 1], in norm (" in one
    assert "test_thread_ranks.py" in zero
    assert "return self.norm(x)" in one


def test_a_message_of_the_backward_is_not_taken_for_one_of_the_forward(threads) -> None:
    """Rank 1 sends as many messages in its backward as rank 0 waits for, and of the same shape."""
    with pytest.raises(
        DeadlockError, match=r"rank 0 waits for .* in blocks.1 [^$]*rank 1 waits for .* in the backward"
    ):
        threads(2).run(without_a_message, 0, False)


def test_a_message_that_is_dropped_in_the_backward(threads) -> None:
    message = r"rank 0 waits for a message of rank 1, .*, in the backward\n.*\.backward\(\)"
    with pytest.raises(DeadlockError, match=message):
        threads(2).run(without_a_message, 3)


def test_a_rank_that_leaves_while_others_wait_is_named(threads) -> None:
    def leave() -> None:
        if parity.manager().domain_rank:
            group().all_gather(torch.zeros(1))

    with pytest.raises(DeadlockError, match=r"rank 0 has ended\nrank 1 waits for the other ranks of \(0, 1\)"):
        threads(2).run(leave)


def test_an_empty_message_is_not_sent(threads) -> None:
    def send() -> list[int]:
        peer = 1 - parity.manager().domain_rank
        came = group().start({peer: torch.zeros(0, 3)}, {peer: [0, 3]}, torch.zeros(1)).wait()
        return [group().traffic.messages, *came[peer].shape]

    assert threads(2).run(send) == [[0, 0, 3]] * 2


def test_a_message_that_nobody_receives_is_an_error(threads) -> None:
    def send() -> None:
        if parity.manager().domain_rank == 0:
            group().start({1: torch.zeros(3)}, {}, torch.zeros(1))

    with pytest.raises(DeadlockError, match=r"rank 0 sent rank 1 float32 \[3\], which it never received"):
        threads(2).run(send)


@pytest.mark.parametrize("how", ["shape", "type", "kind"])
def test_ranks_that_call_different_collectives_are_named(threads, how: str) -> None:
    def call() -> None:
        odd = parity.manager().domain_rank == 1
        values = torch.zeros(2 + (odd and how == "shape"), dtype=torch.float64 if odd and how == "type" else None)
        group().all_gather(values) if odd and how == "kind" else group().all_reduce(values)

    message = r"ranks call different collectives:\nrank 0: all_reduce \(sum\) of float32 \[2\]"
    with pytest.raises(DeadlockError, match=message):
        threads(2).run(call)


def test_a_message_of_another_shape_is_an_error(threads) -> None:
    def call() -> None:
        rank = parity.manager().domain_rank
        group().start({1 - rank: torch.zeros(2)}, {1 - rank: [2 + rank]}, torch.zeros(1)).wait()

    with pytest.raises(DeadlockError, match=r"rank 1 waits for float32 \[3\], and rank 0 sends float32 \[2\]"):
        threads(2).run(call)


def test_what_failed_is_said_and_not_who_waited_for_it(threads) -> None:
    def fail() -> None:
        if parity.manager().domain_rank == 1:
            raise KeyError("cause")
        group().all_reduce(torch.zeros(1))

    with pytest.raises(RankError, match="KeyError: 'cause'") as caught:
        threads(3).run(fail)
    assert list(caught.value.errors) == [1]


def test_a_model_that_ranks_share_is_refused(threads) -> None:
    model = Stem()

    def call() -> None:
        convert_to_domain_parallel(model, parity.manager())
        model(shard_tensor(torch.randn(1, 2, 13, 4), -2, parity.manager()))

    with pytest.raises(RankError, match="must not share a converted model"):
        threads(2).run(call)


# What belongs to a rank


def draws(apart: bool) -> list[Any]:
    rank = parity.manager().domain_rank
    if apart:
        torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
    found = []
    for _ in range(3):
        found += [float(torch.rand(())), float(np.random.rand()), random.random()]
        group().all_reduce(torch.zeros(1))
    return found


def alone(rank: int) -> list[float]:
    torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
    return [draw for _ in range(3) for draw in (float(torch.rand(())), float(np.random.rand()), random.random())]


def test_generators_belong_to_a_rank_and_the_callers_stay(threads) -> None:
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = alone(7)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert threads(3).run(draws, False) == [expected] * 3
    assert threads(3).run(draws, True) == [alone(rank) for rank in range(3)]
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    threads(3).run(draws, True)
    assert [float(torch.rand(())), float(np.random.rand()), random.random()] == expected[:3]


def test_the_manager_is_the_ranks_own_and_the_processes_stays(threads) -> None:
    before = get_domain_parallel_manager()
    seen = threads(3).run(lambda: (parity.manager().domain_rank, parity.manager().domain_world_size))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert get_domain_parallel_manager() is before


def test_ranks_take_turns_in_a_fixed_order(threads) -> None:
    def turns(order: list[int]) -> None:
        for _ in range(3):
            order.append(parity.manager().domain_rank)
            group().all_reduce(torch.zeros(1))

    orders: list[list[int]] = [[], []]
    for order in orders:
        threads(3).run(turns, order)
    # Each goes as far as it can: the last to come goes on, and the others find everything there.
    assert orders[0] == orders[1] == [0, 1, 2, 2, 0, 1, 1, 2, 0]


def test_groups_of_some_ranks() -> None:
    with thread_ranks(6) as world:

        def sums() -> tuple[float, float]:
            row, column = divmod(world.rank, 3)
            mine = torch.tensor(float(world.rank))
            across = world.group([row * 3 + i for i in range(3)]).all_reduce(mine)
            along = world.group([i * 3 + column for i in range(2)]).all_reduce(mine)
            return float(across), float(along)

        assert world.run(sums) == [(3, 3), (3, 5), (3, 7), (12, 3), (12, 5), (12, 7)]


def test_two_views_of_one_group_are_one_group(threads) -> None:
    """A rank that is ahead takes nothing for what others have not taken yet."""
    world = threads(3)

    def sums() -> list[float]:
        views = [world.group(), world.group()]
        return [float(views[i % 2].all_reduce(torch.tensor(10.0**i))) for i in range(4)]

    assert world.run(sums) == [[3, 30, 300, 3000]] * 3


@pytest.mark.parametrize("grad", [True, False])
def test_autograd_is_on_where_it_is_on_for_the_caller(threads, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert threads(2).run(torch.is_grad_enabled) == [grad] * 2


def test_parity_makes_ranks_where_there_are_none() -> None:
    report = verify_parity(Stem(), (torch.randn(1, 2, 13, 4),))
    assert report.ranks == 3
    assert report.exact
    assert verify_parity(Stem(), (torch.randn(1, 2, 13, 4),), ranks=5).ranks == 5


def test_parity_cannot_have_both_a_manager_and_a_number_of_ranks(threads) -> None:
    with pytest.raises(RankError, match="or a number of ranks to be made"):
        threads(2).run(lambda: verify_parity(Stem(), (torch.randn(1, 2, 13, 4),), parity.manager(), ranks=2))


def test_parity_cannot_have_a_cut_over_ranks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="give verify_parity their manager too"):
        verify_parity(Stem(), (torch.randn(1, 2, 13, 4),), cut=CutChannels(ChannelGroup(Alone())))


def test_ring_sum_of_one_and_two() -> None:
    a, b = torch.randn(2, 5)
    assert torch.equal(ring_sum([a]), a)
    assert torch.equal(ring_sum([a, b]), a + b)
