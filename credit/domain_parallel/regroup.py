"""Where the cut of an axis goes when axes are merged and split. Plain integers, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from credit.domain_parallel.partition import Partition


@dataclass(frozen=True)
class Regrouped:
    """How a reshape is done on shards.

    Attributes:
        before: how the old axis must be cut first; where that is as it was, nothing is exchanged.
        axis: the new axis that is cut then.
        after: how.
    """

    before: Partition
    axis: int
    after: Partition


@lru_cache(maxsize=4096)
def regroup(old: tuple[int, ...], new: tuple[int, ...], cut: int, partition: Partition) -> Regrouped | None:
    """Reshaping `old` to `new`, with axis `cut` of `old` cut as `partition`; None if no new axis can be cut.

    Merging keeps every rank's entries: the cut is then inside the new axis. Splitting moves the cut to the new
    axis that needs no exchange, else to the longest: windows of the global grid, whole on one rank.
    """
    first_old, first_new, group = _group(old, new, cut)
    # The group is (before, axis, after) flattened, and the axis (outer, rows, inner).
    before, after = prod(old[first_old:cut]), prod(group) // (prod(old[first_old : cut + 1]))
    found = _merged(partition, before, after, group) or _split(partition, before, after, group)
    return found and Regrouped(found.before, first_new + found.axis, found.after)


def _group(old: tuple[int, ...], new: tuple[int, ...], cut: int) -> tuple[int, int, tuple[int, ...]]:
    """The old axes around `cut` and the new ones made of the same entries: (first old, first new, these new)."""
    i = j = 0
    while True:
        i_end, j_end, size_old, size_new = i + 1, j, old[i], 1
        while size_old != size_new:
            if size_new < size_old:
                size_new *= new[j_end]
                j_end += 1
            else:
                size_old *= old[i_end]
                i_end += 1
        if i <= cut < i_end:
            return i, j, new[j:j_end]
        i, j = i_end, j_end


def _merged(partition: Partition, before: int, after: int, group: tuple[int, ...]) -> Regrouped | None:
    """The cut kept as it is, if it falls inside one of the new axes."""
    outer, inner = before * partition.outer, partition.inner * after
    for axis, size in enumerate(group):
        left, right = prod(group[:axis]), prod(group[axis + 1 :])
        kept = Partition(partition.rows, partition.parts, outer // left, inner // right)
        if outer % left == 0 and inner % right == 0 and kept.length == size:
            return Regrouped(partition, axis, kept)
    return None


def _split(partition: Partition, before: int, after: int, group: tuple[int, ...]) -> Regrouped | None:
    """The cut moved to a new axis that is part of the old one."""
    length, parts = partition.length, partition.parts
    candidates = []
    for axis, size in enumerate(group):
        right = prod(group[axis + 1 :])
        inner, rest = divmod(right, after)
        if size >= parts and rest == 0 and length % (inner * size) == 0:
            moved = Partition(size, parts, length // (inner * size), inner)
            stays = all(list(moved.indices(rank)) == list(partition.indices(rank)) for rank in range(parts))
            candidates.append((not stays, -size, axis, moved))
    if not candidates:
        return None
    _, _, axis, moved = min(candidates, key=lambda candidate: candidate[:3])
    return Regrouped(moved, axis, Partition(moved.rows, parts))
