"""The plan is right on paper: integers only, no ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from credit.domain_parallel.partition import (
    FILL,
    Everything,
    Partition,
    PartitionError,
    TransposedWindow,
    Window,
    make_plan,
)


@given(length=st.integers(0, 2000), parts=st.integers(1, 40))
def test_partition_covers_every_row_once_in_order_and_evenly(length: int, parts: int) -> None:
    partition = Partition(length, parts)
    rows = [row for rank in range(parts) for row in partition.range(rank)]
    assert rows == list(range(length))
    assert max(partition.sizes) - min(partition.sizes) <= 1
    assert list(partition.sizes) == sorted(partition.sizes, reverse=True)
    assert all(row in partition.range(partition.owner(row)) for row in range(length))


windows = st.builds(
    Window,
    kernel=st.integers(1, 9),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 4),
    before=st.integers(0, 6),
    after=st.integers(0, 6),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
transposed = st.builds(
    TransposedWindow,
    kernel=st.integers(1, 7),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 3),
    output_padding=st.integers(0, 2),
)


@given(operator=windows | transposed | st.just(Everything()), length=st.integers(1, 40), parts=st.integers(1, 8))
def test_executing_the_plans_on_row_numbers_gives_every_rank_what_it_needs(operator, length, parts) -> None:
    """assemble(messages(rows)) == needs, messages match at both ends, and no row is sent that is not needed."""
    try:
        plans = [make_plan(operator, Partition(length, parts), rank) for rank in range(parts)]
    except PartitionError:
        return
    owned = Partition(length, parts)
    for rank, plan in enumerate(plans):
        received = {
            peer: [owned.start(peer) + first + i for first, count in plans[peer].sends[rank] for i in range(count)]
            for peer in plan.receives
        }
        assert {peer: len(rows) for peer, rows in received.items()} == plan.receives
        source = {rank: list(owned.range(rank)), **received}
        rows: list[int | None] = []
        for piece in plan.pieces:
            for i in range(piece.count):
                rows.append(None if piece.source == FILL else source[piece.source][piece.first + i * piece.step])
        out = Partition(operator.out_length(length), parts).range(rank)
        gaps = operator.gaps(len(out)) if isinstance(operator, Window) else set()
        needs = operator.needs(out, length)
        # Rows between the windows of a strided kernel stay if they are here, and are not sent for.
        needs = [None if i in gaps and row not in owned.range(rank) else row for i, row in enumerate(needs)]
        assert rows == list(needs)
        assert plan.rows == len(needs)
        foreign = {row for row in needs if row is not None} - set(owned.range(rank))
        assert sum(plan.receives.values()) == len(foreign)
    for rank, plan in enumerate(plans):
        assert {peer for peer in range(parts) if rank in plans[peer].sends} == set(plan.receives)


def test_a_strided_convolution_on_even_rows_reads_one_row_from_one_side_only() -> None:
    # kernel 3, stride 2, padding 1: output 0 of a shard reads the row before it, the last reads none after.
    plans = [make_plan(Window(3, 2, 1, 1, 1), Partition(720, 4), rank) for rank in range(4)]
    assert [plan.receives for plan in plans] == [{}, {0: 1}, {1: 1}, {2: 1}]


def test_patches_aligned_with_the_shards_need_nothing() -> None:
    assert all(make_plan(Window(4, 4), Partition(720, 4), rank).is_identity for rank in range(4))


def test_fewer_rows_than_ranks_are_refused_alike_on_every_rank() -> None:
    messages = set()
    for rank in range(4):
        with pytest.raises(PartitionError) as caught:
            make_plan(Window(4, 4), Partition(15, 4), rank)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "15 rows become 3" in messages.pop()
