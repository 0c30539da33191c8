"""Of which rows of which ranks some rows are made, and, the transpose of that, which sums their gradients are.

Plain integers, without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

FILL = -1
"""Source of a `Piece` of fill (zeros, usually): rows past a pole that belong to no rank."""


@dataclass(frozen=True)
class Piece:
    """`count` rows of `source` (a rank, or FILL), from row `first` on, downwards if `step` is -1.

    `first` counts from the top of this rank's own shard, or of the message received from `source`.
    """

    source: int
    first: int
    count: int
    step: int = 1


Run = tuple[int, Piece]
"""A piece that is added to some rows, from this one on."""


@dataclass(frozen=True)
class Sum:
    """Rows that are sums of rows of others.

    Attributes:
        runs: what they are sums of.
        pieces: of these, those that can be put side by side, and fill between them.
        added: the others.
    """

    runs: tuple[Run, ...]
    pieces: tuple[Piece, ...]
    added: tuple[Run, ...]


def sum_of(runs: Iterable[Run], rows: int) -> Sum:
    """The sum of `runs`, of so many rows. The longest runs that do not overlap are put side by side."""
    runs = tuple(runs)
    taken, beside = bytearray(rows), set()
    for number in sorted(range(len(runs)), key=lambda number: -runs[number][1].count):
        first, piece = runs[number]
        if not any(taken[first : first + piece.count]):
            taken[first : first + piece.count] = b"\1" * piece.count
            beside.add(number)
    pieces, row = [], 0
    for first, piece in sorted((runs[number] for number in beside), key=lambda run: run[0]):
        pieces += [Piece(FILL, 0, first - row)] * (first > row) + [piece]
        row = first + piece.count
    pieces += [Piece(FILL, 0, rows - row)] * (rows > row)
    return Sum(runs, tuple(pieces), tuple(run for number, run in enumerate(runs) if number not in beside))


def transposed(pieces: Sequence[Piece], source: int, rank: int) -> list[Run]:
    """What is added to the gradient of the rows of `source`: pieces of that of what was made, which `rank` has."""
    runs = []
    for start, piece in zip(accumulate((piece.count for piece in pieces), initial=0), pieces, strict=False):
        if piece.source == source and piece.step == 1:
            runs.append((piece.first, Piece(rank, start, piece.count)))
        elif piece.source == source:
            runs.append((piece.first - piece.count + 1, Piece(rank, start + piece.count - 1, piece.count, -1)))
    return runs


def returned(sends: dict[int, tuple[tuple[int, int], ...]]) -> list[Run]:
    """What the peers' messages, with the gradients of the runs of rows that they were sent, are added to."""
    runs = []
    for peer, sent in sends.items():
        starts = accumulate((count for _, count in sent), initial=0)
        runs += [(first, Piece(peer, start, count)) for start, (first, count) in zip(starts, sent, strict=False)]
    return runs
