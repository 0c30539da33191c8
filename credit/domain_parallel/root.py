"""Into a converted model and out of it: shards become slabs, slabs become shards.

A shard alone does not tell the global length: over 2 ranks both 16 and 17 rows leave 8 to the second. So the root of a
converted model compares what it was given across the domain group at the start of every forward, in one small message.
What happens inside depends on that alone, and every rank takes the same branch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.lengths import check_lengths, gather_numbers, gather_texts
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import plain, reshard, whole
from credit.domain_parallel.slab import Slab, inside_model, refuse, rules_of

MAX_SHARDED_INPUTS = 30


@dataclass(frozen=True)
class Border:
    """What is cut at the border of a converted model.

    A tensor with a batch axis, a channel axis and all axes from `shard_dim` on is a field, and this rank has its
    rows. Anything else (times, scalars, class scores) is whole, and the same on every rank.
    """

    manager: DomainParallelManager
    shard_dim: int

    @property
    def group(self) -> RankGroup:
        """The ranks that share a field."""
        return self.manager.group

    def is_field(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim >= 2 - self.shard_dim

    def run(self, root: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        """forward(*args, **kwargs) of shards, as slabs inside.

        Raises:
            DomainParallelError: on every rank, if the inputs do not fit together, or if the model draws random
                numbers that are not the same on all ranks.
        """
        before = _generator_state()
        (args, kwargs), draws_alike = self._enter(root, args, kwargs, before)
        with inside_model():
            output = forward(*args, **kwargs)
        if not draws_alike and _generator_state() != before:
            raise DomainParallelError(
                f"{type(root).__name__} draws random numbers (dropout?), and the domain ranks' generators differ, so "
                f"these are not the numbers of one device. Call torch.manual_seed with one seed on all ranks of a "
                f"domain group."
            )
        return self.leave(output)

    def _enter(self, root: nn.Module, args: tuple, kwargs: dict, generators: tuple) -> tuple[Any, bool]:
        leaves, structure = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Slab))
        fields = [leaf for leaf in leaves if self.is_field(leaf)]
        if len(fields) > MAX_SHARDED_INPUTS:
            raise DomainParallelError(f"{type(root).__name__} got {len(fields)} fields, at most {MAX_SHARDED_INPUTS}")
        rest = (root.training, torch.is_grad_enabled(), *(self._describe(leaf) for leaf in leaves))
        heights = [leaf.shape[self.shard_dim] for leaf in fields]
        padding = [-1] * (MAX_SHARDED_INPUTS - len(heights))
        rows = gather_numbers([_digest(rest), _digest(generators), *heights, *padding], self.group)
        if len({(row[0], row.count(-1)) for row in rows}) > 1:
            self._refuse_disagreement(root, rest)
        columns = iter([[row[2 + i] for row in rows] for i in range(len(fields))])
        name = f"inputs of {type(root).__name__}"
        entered = [self._slab(leaf, next(columns), name) if self.is_field(leaf) else leaf for leaf in leaves]
        return tree_unflatten(entered, structure), len({row[1] for row in rows}) == 1

    def _slab(self, x: Tensor, heights: list[int], name: str) -> Slab:
        length = check_lengths(heights, self.group, name)
        partition = Partition(length, self.group.size)
        return Slab(x, x.ndim + self.shard_dim, partition, self.group)

    def leave(self, output: Any) -> Any:
        """This rank's rows of the fields in `output`, whatever holds them."""
        return tree_map(self._leave, output, is_leaf=lambda x: isinstance(x, Slab))

    def _leave(self, x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
            return dataclasses.replace(x, **{name: self.leave(value) for name, value in fields.items()})
        if not isinstance(x, Tensor):
            return x
        if isinstance(x, Slab):
            if type(x) is not Slab:
                with rules_of(type(x)):
                    refuse("leaving the model", "its output must be whole but for its rows")
            if not self.is_field(x):
                return _Once.apply(whole(x), self.group)
            axis = x.ndim + self.shard_dim
            if x.shape[axis] >= self.group.size:
                return plain(x if x.cut == axis else reshard(x, axis)).local
            return _Once.apply(whole(x), self.group)
        if self.is_field(x) and x.shape[self.shard_dim] >= self.group.size:
            rows = Partition(x.shape[self.shard_dim], self.group.size).range(self.group.rank)
            return x.narrow(self.shard_dim, rows.start, len(rows))
        return _Once.apply(x, self.group)

    def _describe(self, leaf: Any) -> Any:
        """What must agree across the domain group, and may decide a model's path through its layers."""
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, bool | int | float | str | type(None)) else type(leaf).__name__
        shape = list(leaf.shape)
        if self.is_field(leaf):
            shape[self.shard_dim] = -1
        return (*shape, str(leaf.dtype), leaf.requires_grad)

    def _refuse_disagreement(self, root: nn.Module, rest: tuple) -> None:
        described = gather_texts(str(rest), self.group)
        lines = "\n".join(f"  domain rank {rank}: {text}" for rank, text in enumerate(described))
        raise DomainParallelError(
            f"{type(root).__name__}: the domain ranks were given different inputs. Apart from the rows of a field "
            f"they must be equal in shape, type and mode: domain peers need the same batch, see "
            f"data_parallel_coords.\n{lines}"
        )


class _Once(torch.autograd.Function):
    """A whole tensor leaves the model on every rank: each computes the same loss, and the cotangent counts once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.group.rank == 0 else torch.zeros_like(grad)), None


def _generator_state() -> tuple:
    """Where the random generators stand: the CPU's, and the current accelerator's if there is one."""
    state: tuple = (hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).hexdigest(),)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state += (generator.initial_seed(), generator.get_offset())
    return state


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)
