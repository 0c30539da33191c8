"""The global length of a sharded axis, which a shard alone does not tell.

Over 2 ranks both 16 and 17 rows leave 8 to the second. A layer therefore asks its peers once, and never
again: the first forward of a model with given input shapes gathers the local length at every converted
layer, later forwards look it up. What is looked up depends only on what all ranks know (the input shapes,
which the root compares across ranks at the start of every forward), so either all ranks ask or none does.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager
from credit.domain_parallel.partition import Partition

MAX_SHARDED_INPUTS = 30


def global_length(local: int, manager: DomainParallelManager, what: str) -> int:
    """Sum of the local lengths over the domain group, after checking that they are its partition.

    Args:
        local: rows on this rank.
        manager: gives the domain group; one message of 8 bytes a rank.
        what: what the rows belong to, for the error.

    Raises:
        DomainParallelError: on every rank, if the lengths are not the partition of their sum.
    """
    lengths = [row[0] for row in _gather([local], manager)]
    return _check_lengths(lengths, manager, what)


def _check_lengths(lengths: list[int], manager: DomainParallelManager, what: str) -> int:
    total = sum(lengths)
    expected = Partition(total, manager.domain_world_size).sizes
    if tuple(lengths) != expected:
        raise DomainParallelError(
            f"{what}: the domain ranks hold {lengths} rows, but {total} rows over {len(lengths)} ranks are "
            f"{list(expected)}. Cut fields with shard_tensor, and do not slice or pad the sharded axis in between."
        )
    return total


def _gather(numbers: list[int], manager: DomainParallelManager) -> list[list[int]]:
    mine = torch.tensor(numbers, dtype=torch.int64, device=manager.message_device)
    everyone = mine.new_empty(manager.domain_world_size, len(numbers))
    dist.all_gather(list(everyone.unbind()), mine, group=manager.domain_group)
    manager.traffic.collectives += 1
    return everyone.tolist()


class Lengths:
    """What the layers of one converted model know about global lengths.

    `open` and `close` are the forward hooks of the root. Outside the root's forward (a layer called by
    itself, recomputation for activation checkpointing) layers ask their peers every time.
    """

    def __init__(self, manager: DomainParallelManager, shard_dim: int) -> None:
        self.manager = manager
        self.shard_dim = shard_dim
        self._key: tuple | None = None
        self._calls: dict[str, int] = defaultdict(int)
        self._known: dict[tuple, tuple[int, int]] = {}

    def open(self, root: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Compare the inputs across the domain group, and key everything looked up by their shapes."""
        leaves = tree_leaves((args, kwargs))
        sharded = [leaf for leaf in leaves if _is_field(leaf)]
        if len(sharded) > MAX_SHARDED_INPUTS:
            raise DomainParallelError(f"{type(root).__name__} got {len(sharded)} fields, at most {MAX_SHARDED_INPUTS}")
        rest = (root.training, torch.is_grad_enabled(), *(_describe(leaf, self.shard_dim) for leaf in leaves))
        heights = [leaf.shape[self.shard_dim] for leaf in sharded]
        row = [_digest(rest), *heights, *[-1] * (MAX_SHARDED_INPUTS - len(heights))]
        rows = _gather(row, self.manager)
        if len({(row[0], row.count(-1)) for row in rows}) > 1:
            self._refuse_disagreement(root, rest)
        name = f"inputs of {type(root).__name__}"
        columns = [[row[1 + i] for row in rows] for i in range(len(sharded))]
        lengths = tuple(_check_lengths(column, self.manager, name) for column in columns)
        self._key = (rest, lengths)
        self._calls.clear()

    def close(self, root: torch.nn.Module, args: tuple, output: Any) -> None:
        self._key = None

    def of(self, local: int, path: str) -> int:
        """Global length of a tensor of `local` rows that the layer at `path` was given."""
        if self._key is None:
            return global_length(local, self.manager, path)
        call = (self._key, path, self._calls[path])
        self._calls[path] += 1
        if call not in self._known:
            self._known[call] = (local, global_length(local, self.manager, path))
        seen, total = self._known[call]
        if seen != local:
            raise DomainParallelError(
                f"{path}: got {local} rows where an earlier forward with the same input shapes had {seen}. The shapes "
                f"inside a sharded model may depend on its inputs' shapes only, not on their values or on chance."
            )
        return total

    def _refuse_disagreement(self, root: torch.nn.Module, rest: tuple) -> None:
        described: list[Any] = [None] * self.manager.domain_world_size
        dist.all_gather_object(described, str(rest), group=self.manager.domain_group)
        lines = "\n".join(f"  domain rank {rank}: {text}" for rank, text in enumerate(described))
        raise DomainParallelError(
            f"{type(root).__name__}: the domain ranks were given different inputs. Apart from the rows of a field "
            f"they must be equal in shape, type and mode: domain peers need the same batch, see "
            f"data_parallel_coords.\n{lines}"
        )


def _is_field(leaf: Any) -> bool:
    """Fields are (..., channel, latitude, longitude): what has fewer than four axes is not sharded."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim >= 4


def _describe(leaf: Any, shard_dim: int) -> Any:
    """What must agree across the domain group, and may decide a model's path through its layers."""
    if not isinstance(leaf, torch.Tensor):
        return leaf if isinstance(leaf, bool | int | float | str | type(None)) else type(leaf).__name__
    shape = list(leaf.shape)
    if _is_field(leaf):
        shape[shard_dim] = -1
    return (*shape, str(leaf.dtype))


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)
