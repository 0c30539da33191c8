"""The global length of a sharded axis, which a shard alone does not tell: it is asked for."""

from __future__ import annotations

import torch

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.partition import Partition


def global_length(local: int, group: RankGroup, what: str) -> int:
    """Sum of the local lengths over the domain group, after checking that they are its partition.

    Args:
        local: rows on this rank.
        group: the ranks that share the field; one message of 8 bytes a rank.
        what: what the rows belong to, for the error.

    Raises:
        DomainParallelError: on every rank, if the lengths are not the partition of their sum.
    """
    lengths = [row[0] for row in gather_numbers([local], group)]
    return check_lengths(lengths, group, what)


def check_lengths(lengths: list[int], group: RankGroup, what: str) -> int:
    """Sum of the lengths that the ranks hold, which must be its partition."""
    total = sum(lengths)
    expected = Partition(total, group.size).sizes
    if tuple(lengths) != expected:
        raise DomainParallelError(
            f"{what}: the domain ranks hold {lengths} rows, but {total} rows over {len(lengths)} ranks are "
            f"{list(expected)}. Cut fields with shard_tensor, and do not slice or pad the sharded axis in between."
        )
    if total < len(lengths):
        raise DomainParallelError(f"{what}: {total} rows over {len(lengths)} ranks; each needs at least one")
    return total


def gather_numbers(numbers: list[int], group: RankGroup) -> list[list[int]]:
    """What every domain rank gave, by rank: one small message, on the CPU where the group can do that."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=group.message_device)
    return group.all_gather(mine).tolist()


def gather_texts(text: str, group: RankGroup) -> list[str]:
    """What every rank says, by rank."""
    mine = text.encode()
    sizes = [row[0] for row in gather_numbers([len(mine)], group)]
    padded = [*mine, *[0] * (max(sizes) - len(mine))]
    rows = gather_numbers(padded, group)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
