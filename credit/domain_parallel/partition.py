"""Who owns which rows, which rows an operator reads, and who sends what to whom.

Everything about sharding an axis is decided here, in plain integers and without torch, as a pure function
of what every rank knows: the global length, the number of ranks and the operator's geometry. Ranks that
evaluate it agree by construction, so no message is needed to agree on messages.

    Partition   a global length cut over ranks
    Window      which input rows an output row reads (also TransposedWindow, Taps, Rows, Everything)
    Plan        per rank: the rows it needs, what it sends, what it receives, what it fills
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import eq
from typing import Protocol

from credit.domain_parallel.pieces import FILL, Piece, Sum, returned, sum_of, transposed

PAD_MODES = ("zeros", "reflect", "replicate", "circular")


class PartitionError(ValueError):
    """The geometry asked for has no exact sharded form. Raised alike on every rank."""


@dataclass(frozen=True)
class Partition:
    """`rows` rows over `parts` ranks, in order; sizes differ by at most one, larger first.

    A function of (rows, parts) alone, so that any two tensors of the same global length line up whatever path
    they took through a model. An axis that was merged with others has the cut inside it: it is
    (outer, rows, inner) flattened, and a rank owns its rows for every outer and inner index.
    """

    rows: int
    parts: int
    outer: int = 1
    inner: int = 1

    @property
    def length(self) -> int:
        return self.outer * self.rows * self.inner

    @property
    def is_plain(self) -> bool:
        return self.outer == self.inner == 1

    def start(self, rank: int) -> int:
        quotient, remainder = divmod(self.rows, self.parts)
        return rank * quotient + min(rank, remainder)

    def range(self, rank: int) -> range:
        """The rows of `rank`."""
        return range(self.start(rank), self.start(rank + 1))

    def size(self, rank: int) -> int:
        """Entries of the axis that `rank` owns."""
        return self.outer * len(self.range(rank)) * self.inner

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.size(rank) for rank in range(self.parts))

    def indices(self, rank: int) -> Sequence[int]:
        """The entries that `rank` owns, in the order it holds them."""
        rows = self.range(rank)
        if self.outer == 1:
            return range(rows.start * self.inner, rows.stop * self.inner)
        tops = range(rows.start * self.inner, self.length, self.rows * self.inner)
        return [top + i for top in tops for i in range(len(rows) * self.inner)]

    @property
    def order(self) -> list[int]:
        """All entries, in the order in which the ranks hold them, one rank after another."""
        return [entry for rank in range(self.parts) for entry in self.indices(rank)]

    def locate(self, index: int) -> tuple[int, int]:
        """Who owns entry `index`, and where in its shard."""
        outer, rest = divmod(index, self.rows * self.inner)
        row, inner = divmod(rest, self.inner)
        quotient, remainder = divmod(self.rows, self.parts)
        wide = remainder * (quotient + 1)
        rank = row // (quotient + 1) if row < wide else remainder + (row - wide) // quotient
        owned = self.range(rank)
        return rank, (outer * len(owned) + row - owned.start) * self.inner + inner

    def owner(self, index: int) -> int:
        return self.locate(index)[0]


class RowMap(Hashable, Protocol):
    """An operator seen along the sharded axis: from output rows to the input rows they read."""

    def out_length(self, length: int) -> int: ...

    def needs(self, out: Sequence[int], length: int) -> Sequence[int | None]:
        """Global input rows, in the order the local operator wants them; None is a row of fill (zeros)."""


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

    def needs(self, out: Sequence[int], length: int) -> list[int | None]:
        self._check(length)
        first = out[0] * self.stride - self.before
        stop = out[-1] * self.stride - self.before + self.reach
        return [self._row(row, length) for row in range(first, stop)]

    def gaps(self, outputs: int) -> set[int]:
        """Places in what is needed for so many output rows that none of them reads (stride > kernel)."""
        read = {o * self.stride + k * self.dilation for o in range(outputs) for k in range(self.kernel)}
        return set(range((outputs - 1) * self.stride + self.reach)) - read

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
class Span:
    """All rows from the first to the last that several windows with as many output rows read: one exchange for all."""

    windows: tuple[Window, ...]

    def out_length(self, length: int) -> int:
        return self.windows[0].out_length(length)

    def start(self, out: Sequence[int]) -> int:
        """The first row of the span, counted from the first of the field; negative past its edge."""
        return min(out[0] * window.stride - window.before for window in self.windows)

    def needs(self, out: Sequence[int], length: int) -> list[int | None]:
        stop = max(out[-1] * window.stride - window.before + window.reach for window in self.windows)
        return [row if 0 <= row < length else None for row in range(self.start(out), stop)]


@dataclass(frozen=True)
class Halo:
    """Of what a `Window` reads, only the `before` rows above and the `after` rows below the output rows' own.

    Between the two are as many rows of fill: of a convolution of all this, the first `before` rows are what the rows
    above contribute, and the last `after` ones what those below do.
    """

    window: Window

    def out_length(self, length: int) -> int:
        return self.window.out_length(length)

    def needs(self, out: Sequence[int], length: int) -> list[int | None]:
        rows = self.window.needs(out, length)
        above, below = self.window.before, self.window.after
        return [*rows[:above], *[None] * (above + below), *rows[len(rows) - below :]]


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

    def needs(self, out: Sequence[int], length: int) -> list[int]:
        """All rows that reach `out`; one row nearby if none does (its contribution is cut off)."""
        first = -((self.reach - 1 - out[0] - self.padding) // self.stride)
        last = (out[-1] + self.padding) // self.stride
        first = min(max(first, 0), length - 1)
        return list(range(first, min(max(last, first), length - 1) + 1))

    def crop(self, out: Sequence[int], length: int) -> tuple[int, int]:
        """Rows to cut (negative: to append) before and after what the unpadded local operator returns."""
        rows = self.needs(out, length)
        begin = rows[0] * self.stride - self.padding
        end = begin + (len(rows) - 1) * self.stride + self.reach
        return out[0] - begin, end - out[-1] - 1


@dataclass(frozen=True, eq=False)
class Taps:
    """Output row o is the sum over k of weights[o][k] * input row rows[o][k] (interpolation)."""

    rows: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def out_length(self, length: int) -> int:
        return len(self.rows)

    def needs(self, out: Sequence[int], length: int) -> list[int]:
        taps = [row for o in out for row in self.rows[o]]
        return list(range(min(taps), max(taps) + 1))


@dataclass(frozen=True)
class Rows:
    """Output row o is input row `rows[o]`; None is a row of fill (slices, rolls, flips, pads)."""

    rows: Sequence[int | None]

    def out_length(self, length: int) -> int:
        return len(self.rows)

    def needs(self, out: Sequence[int], length: int) -> list[int | None]:
        return [self.rows[o] for o in out]


@dataclass(frozen=True)
class Everything:
    """Every rank needs these rows, None for all (gathering a field)."""

    rows: Sequence[int | None] | None = None

    def out_length(self, length: int) -> int:
        return length

    def needs(self, out: Sequence[int], length: int) -> Sequence[int | None]:
        return range(length) if self.rows is None else self.rows


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
        sends_any: some rank sends something.
        stays: every rank needs the rows that it owns.
        gradient: of the rows owned, a sum of those of what was needed of them, here and by the peers.
        gradients: of the rows that came from each peer, sums of those of what was needed here.
    """

    pieces: tuple[Piece, ...]
    sends: dict[int, tuple[tuple[int, int], ...]]
    receives: dict[int, int]
    out: Sequence[int]
    length: int
    shard: int
    rank: int
    sends_any: bool
    stays: bool
    gradient: Sum
    gradients: dict[int, Sum]

    @property
    def is_identity(self) -> bool:
        """True if the rows needed are the rows owned."""
        own = (Piece(self.rank, 0, self.shard),)
        return self.pieces == own and not self.sends

    @property
    def rows(self) -> int:
        return sum(piece.count for piece in self.pieces)


@lru_cache(maxsize=4096)
def make_plan(operator: RowMap, source: Partition, rank: int, target: Partition | None = None) -> Plan:
    """Plan of `rank` for `operator` on an axis cut as `source` says, its output cut as `target` says.

    Args:
        operator: which rows are needed.
        source: the cut of the input.
        rank: whose plan.
        target: the cut of the output; by default the plain partition of its length.

    Raises:
        PartitionError: if a rank would own no input or no output row (on every rank alike).
    """
    length, parts = source.length, source.parts
    if target is None:
        target = Partition(operator.out_length(length), parts)
    if min(source.rows, target.rows) < parts:
        raise PartitionError(
            f"{length} rows become {max(target.length, 0)} here, and {parts} domain ranks need at least one row each; "
            f"use a smaller domain size or a finer grid"
        )
    needs = [_needs(operator, source, target, peer) for peer in range(parts)]
    foreign = [_foreign_rows(needs[peer], source, peer) for peer in range(parts)]
    pieces = _pieces(needs[rank], source, rank, foreign[rank])
    sends = {peer: _runs(rows[rank].values()) for peer, rows in enumerate(foreign) if rank in rows}
    receives = {peer: len(rows) for peer, rows in foreign[rank].items()}
    return Plan(
        pieces=pieces,
        sends=sends,
        receives=receives,
        out=target.indices(rank),
        length=length,
        shard=source.size(rank),
        rank=rank,
        sends_any=any(foreign),
        stays=not any(foreign) and all(_are_own(needs[peer], source, peer) for peer in range(parts)),
        gradient=sum_of([*transposed(pieces, rank, rank), *returned(sends)], source.size(rank)),
        gradients={peer: sum_of(transposed(pieces, peer, rank), count) for peer, count in receives.items()},
    )


def _are_own(rows: Sequence[int | None], source: Partition, rank: int) -> bool:
    return len(rows) == source.size(rank) and all(map(eq, rows, source.indices(rank)))


def _needs(operator: RowMap, source: Partition, target: Partition, rank: int) -> Sequence[int | None]:
    out = target.indices(rank)
    needs = operator.needs(out, source.length)
    gaps = operator.gaps(len(out)) if isinstance(operator, Window) else ()
    if not gaps:
        return needs
    own = source.indices(rank)
    return [None if place in gaps and row not in own else row for place, row in enumerate(needs)]


def _foreign_rows(needs: Sequence[int | None], source: Partition, rank: int) -> dict[int, dict[int, int]]:
    """For each peer that `rank` needs rows of, those rows, each once, ascending: {row: its place in the shard}.

    The contents of one message.
    """
    own = source.indices(rank)
    wanted = set(needs) - set(own) - {None}
    found: dict[int, dict[int, int]] = {}
    for row in sorted(row for row in wanted if row is not None):
        peer, place = source.locate(row)
        found.setdefault(peer, {})[row] = place
    return found


def _runs(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _pieces(
    needs: Sequence[int | None], source: Partition, rank: int, foreign: dict[int, dict[int, int]]
) -> tuple[Piece, ...]:
    places = {row: (peer, place) for peer, rows in foreign.items() for place, row in enumerate(rows)}
    pieces: list[Piece] = []
    for row in needs:
        if row is None:
            peer, place = FILL, 0
        else:
            peer, place = places[row] if row in places else source.locate(row)
        grown = _grow(pieces[-1], peer, place) if pieces else None
        if grown:
            pieces[-1] = grown
        else:
            pieces.append(Piece(peer, place, 1))
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
