"""Who owns which rows, which rows an operator reads, and who sends what to whom.

Everything about sharding an axis is decided here, in plain integers and without torch, as a pure function
of what every rank knows: the global length, the number of ranks and the operator's geometry. Ranks that
evaluate it agree by construction, so no message is needed to agree on messages.

    Partition   a global length cut over ranks
    Window      which input rows an output row reads (also TransposedWindow, Taps, Everything)
    Plan        per rank: the rows it needs, what it sends, what it receives, what it fills
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

PAD_MODES = ("zeros", "reflect", "replicate", "circular")
FILL = -1
"""Source of a `Piece` made of zeros: rows past a pole that belong to no rank."""


class PartitionError(ValueError):
    """The geometry asked for has no exact sharded form. Raised alike on every rank."""


@dataclass(frozen=True)
class Partition:
    """`length` rows over `parts` ranks, in order; sizes differ by at most one, larger first.

    A function of (length, parts) alone, so that any two tensors of the same global length line up
    whatever path they took through a model.
    """

    length: int
    parts: int

    def start(self, rank: int) -> int:
        quotient, remainder = divmod(self.length, self.parts)
        return rank * quotient + min(rank, remainder)

    def range(self, rank: int) -> range:
        return range(self.start(rank), self.start(rank + 1))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(self.range(rank)) for rank in range(self.parts))

    def owner(self, row: int) -> int:
        quotient, remainder = divmod(self.length, self.parts)
        wide = remainder * (quotient + 1)
        if row < wide:
            return row // (quotient + 1)
        return remainder + (row - wide) // quotient


class RowMap(Protocol):
    """An operator seen along the sharded axis: from output rows to the input rows they read."""

    def out_length(self, length: int) -> int: ...

    def needs(self, out: range, length: int) -> Sequence[int | None]:
        """Global input rows, in the order the local operator wants them; None is a row of zeros."""


@dataclass(frozen=True)
class Window:
    """Output row o reads padded input rows o * stride + k * dilation, k < kernel (convolution, pooling).

    `before` and `after` rows are added past the poles: zeros, or rows of the field itself as
    `torch.nn.functional.pad` does (reflect, replicate, circular).
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"

    def out_length(self, length: int) -> int:
        return (length + self.before + self.after - self.reach) // self.stride + 1

    @property
    def reach(self) -> int:
        """Input rows from the first to the last that one output row reads."""
        return self.dilation * (self.kernel - 1) + 1

    def needs(self, out: range, length: int) -> list[int | None]:
        self._check(length)
        first = out.start * self.stride - self.before
        stop = (out.stop - 1) * self.stride - self.before + self.reach
        return [self._row(row, length) for row in range(first, stop)]

    def _check(self, length: int) -> None:
        # The bounds of torch.nn.functional.pad, so that sharded and plain refuse the same fields.
        widest = max(self.before, self.after)
        if self.mode == "reflect" and widest >= length:
            raise PartitionError(f"reflect padding of {widest} rows needs more than {length} rows")
        if self.mode == "circular" and widest > length:
            raise PartitionError(f"circular padding of {widest} rows needs at least that many, not {length}")

    def _row(self, row: int, length: int) -> int | None:
        if 0 <= row < length:
            return row
        match self.mode:
            case "zeros":
                return None
            case "reflect":
                return -row if row < 0 else 2 * (length - 1) - row
            case "replicate":
                return min(max(row, 0), length - 1)
            case "circular":
                return row % length
        raise PartitionError(f"unknown padding mode {self.mode!r}; known: {', '.join(PAD_MODES)}")


@dataclass(frozen=True)
class TransposedWindow:
    """Input row i adds to output rows i * stride - padding + k * dilation (transposed convolution)."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    output_padding: int = 0

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def out_length(self, length: int) -> int:
        return (length - 1) * self.stride - 2 * self.padding + self.reach + self.output_padding

    def needs(self, out: range, length: int) -> list[int]:
        """All rows that reach `out`; one row nearby if none does (its contribution is cut off)."""
        first = -((self.reach - 1 - out.start - self.padding) // self.stride)
        last = (out.stop - 1 + self.padding) // self.stride
        first = min(max(first, 0), length - 1)
        return list(range(first, min(max(last, first), length - 1) + 1))

    def crop(self, out: range, length: int) -> tuple[int, int]:
        """Rows to cut (negative: to append) before and after what the unpadded local operator returns."""
        rows = self.needs(out, length)
        begin = rows[0] * self.stride - self.padding
        end = begin + (len(rows) - 1) * self.stride + self.reach
        return out.start - begin, end - out.stop


@dataclass(frozen=True, eq=False)
class Taps:
    """Output row o is the sum over k of weights[o][k] * input row rows[o][k] (interpolation)."""

    rows: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def out_length(self, length: int) -> int:
        return len(self.rows)

    def needs(self, out: range, length: int) -> list[int]:
        taps = [row for o in out for row in self.rows[o]]
        return list(range(min(taps), max(taps) + 1))


@dataclass(frozen=True)
class Everything:
    """Every rank needs every row (gathering a field)."""

    def out_length(self, length: int) -> int:
        return length

    def needs(self, out: range, length: int) -> list[int]:
        return list(range(length))


@dataclass(frozen=True)
class Piece:
    """`count` rows of `source` (a rank, or FILL), from row `first` on, downwards if `step` is -1.

    `first` counts from the top of this rank's own shard, or of the message received from `source`.
    """

    source: int
    first: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class Plan:
    """What one rank does so that it holds the rows its operator reads, and nothing else is sent.

    Attributes:
        pieces: what to concatenate, in order.
        sends: for each peer, the runs (first, count) of own rows that make up its one message.
        receives: for each peer, the number of rows in its one message.
        out: global output rows this rank computes.
        length: global number of input rows.
        shard: number of input rows this rank owns.
    """

    pieces: tuple[Piece, ...]
    sends: dict[int, tuple[tuple[int, int], ...]]
    receives: dict[int, int]
    out: range
    length: int
    shard: int
    rank: int

    @property
    def is_identity(self) -> bool:
        """True if the rows needed are the rows owned."""
        own = (Piece(self.rank, 0, self.shard),)
        return self.pieces == own and not self.sends

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)


@lru_cache(maxsize=4096)
def make_plan(operator: RowMap, length: int, parts: int, rank: int) -> Plan:
    """Plan of `rank` for `operator` on a field of `length` rows cut over `parts` ranks.

    Raises:
        PartitionError: if a rank would own no input or no output row (on every rank alike).
    """
    owned, out = Partition(length, parts), Partition(operator.out_length(length), parts)
    if min(length, out.length) < parts:
        raise PartitionError(
            f"{length} rows become {max(out.length, 0)} here, and {parts} domain ranks need at least one row each; "
            f"use a smaller domain size or a finer grid"
        )
    needs = [operator.needs(out.range(peer), length) for peer in range(parts)]
    wanted = {peer: _rows_of(needs[peer], owned.range(rank)) for peer in range(parts) if peer != rank}
    messages = {peer: _rows_of(needs[rank], owned.range(peer)) for peer in range(parts) if peer != rank}
    top = owned.start(rank)
    return Plan(
        pieces=_pieces(needs[rank], owned, rank, messages),
        sends={peer: _runs([row - top for row in rows]) for peer, rows in wanted.items() if rows},
        receives={peer: len(rows) for peer, rows in messages.items() if rows},
        out=out.range(rank),
        length=length,
        shard=len(owned.range(rank)),
        rank=rank,
    )


def _rows_of(needs: Sequence[int | None], owned: range) -> list[int]:
    """The rows of `owned` among `needs`, each once, ascending: the contents of one message."""
    return sorted({row for row in needs if row is not None and row in owned})


def _runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _pieces(
    needs: Sequence[int | None], owned: Partition, rank: int, messages: dict[int, list[int]]
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for row in needs:
        if row is None:
            source, index = FILL, 0
        else:
            source = owned.owner(row)
            index = row - owned.start(rank) if source == rank else bisect_left(messages[source], row)
        grown = _grow(pieces[-1], source, index) if pieces else None
        if grown:
            pieces[-1] = grown
        else:
            pieces.append(Piece(source, index, 1))
    return tuple(pieces)


def _grow(last: Piece, source: int, index: int) -> Piece | None:
    """`last` with one more row, if that row continues it."""
    if source != last.source:
        return None
    if source == FILL:
        return Piece(FILL, 0, last.count + 1)
    for step in (1, -1) if last.count == 1 else (last.step,):
        if index == last.first + step * last.count:
            return Piece(source, last.first, last.count + 1, step)
    return None
