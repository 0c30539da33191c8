"""The plan is right on paper: integers only, no ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from credit.domain_parallel.partition import (
    Everything,
    Partition,
    PartitionError,
    Plan,
    TransposedWindow,
    Window,
    make_plan,
)
from credit.domain_parallel.pieces import FILL, Piece, Sum


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


@given(operator=windows | transposed | st.just(Everything()), length=st.integers(1, 40), parts=st.integers(1, 8))
def test_the_transposed_plans_add_every_gradient_to_the_row_it_is_of_once(operator, length, parts) -> None:
    """Gradients are named (rank, place) here, and what is added up is a list of names."""
    try:
        plans = [make_plan(operator, Partition(length, parts), rank) for rank in range(parts)]
    except PartitionError:
        return
    owned = Partition(length, parts)
    needed = [
        [
            None if piece.source == FILL else (piece.source, piece.first + i * piece.step)
            for piece in plan.pieces
            for i in range(piece.count)
        ]
        for plan in plans
    ]
    gradients = [[[(rank, place)] for place in range(len(rows))] for rank, rows in enumerate(needed)]
    messages = {
        (rank, peer): added({rank: gradients[rank]}, rows)
        for rank, plan in enumerate(plans)
        for peer, rows in plan.gradients.items()
    }
    found = []
    for rank, plan in enumerate(plans):
        received = {peer: messages[peer, rank] for peer in plan.sends}
        found += added({rank: gradients[rank], **received}, plan.gradient)
    expected: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    for rank, rows in enumerate(needed):
        for place, source in enumerate(rows):
            if source is not None:
                expected[global_row(source, rank, plans, owned)].append((rank, place))
    assert [sorted(names) for names in found] == expected


def added(source: dict[int, list[list]], rows: Sum) -> list[list]:
    """What a `Sum` makes of lists of names."""

    def taken(piece: Piece) -> list[list]:
        if piece.source == FILL:
            return [[] for _ in range(piece.count)]
        return [source[piece.source][piece.first + i * piece.step] for i in range(piece.count)]

    found = [[*names] for piece in rows.pieces for names in taken(piece)]
    for first, piece in rows.added:
        for i, names in enumerate(taken(piece)):
            found[first + i] += names
    return found


def global_row(source: tuple[int, int], rank: int, plans: list[Plan], owned: Partition) -> int:
    """Of a row that `rank` has itself, or from a peer's message."""
    peer, place = source
    if peer == rank:
        return owned.start(rank) + place
    return [owned.start(peer) + first + i for first, count in plans[peer].sends[rank] for i in range(count)][place]


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
