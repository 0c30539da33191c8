"""Into a converted model and out of it: shards become slabs, slabs become shards.

A shard alone does not tell the global length: over 2 ranks both 16 and 17 rows leave 8 to the second. So the root of a
converted model compares what it was given across the domain group at the start of every forward, in one small message.
What happens inside depends on that alone, and every rank takes the same branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from credit.domain_parallel.as_written import as_written
from credit.domain_parallel.autocast import casts_of_its_own
from credit.domain_parallel.containers import closed, flattened, opened, restored
from credit.domain_parallel.gathered import gathers_refused
from credit.domain_parallel.generators import GENERATORS, digest, generator_states
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.hooks import answer_parameter_hooks
from credit.domain_parallel.lengths import check_lengths, gather_numbers, gather_texts
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import Once, plain, reshard, whole
from credit.domain_parallel.side_doors import make_buffers_whole, refuse_side_doors
from credit.domain_parallel.slab import Slab, class_name, inside_model, refuse, rules_of
from credit.domain_parallel.torch_private import tree_map
from credit.domain_parallel.whole_view import as_whole

if TYPE_CHECKING:
    from credit.domain_parallel.recorded import Recorder

MAX_SHARDED_INPUTS = 28

_READY = 62
"""The bit that tells a rank's peers that it can replay the call, above those of the rows and of their order."""


@dataclass(frozen=True)
class Border:
    """What is cut at the border of a converted model.

    A tensor with a batch axis, a channel axis and all axes from `shard_dim` on is a field, and this rank has its
    rows. Anything else (times, scalars, class scores) is whole, and the same on every rank.

    Attributes:
        fallback: what becomes of a function without a rule.
        recorder: records calls, and replays them; None for none.
    """

    manager: DomainParallelManager
    shard_dim: int
    fallback: Literal["gather", "refuse"] = "gather"
    recorder: Recorder | None = None

    @property
    def group(self) -> RankGroup:
        """The ranks that share a field."""
        return self.manager.group

    def answer_hooks(self, root: nn.Module) -> None:
        """See to the hooks that parameters have, before a forward."""
        answer_parameter_hooks(root, self.group)

    def is_field(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim >= 2 - self.shard_dim

    def run(self, root: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """forward(*args, **kwargs) of shards, as slabs inside.

        Raises:
            DomainParallelError: on every rank, if the inputs do not fit together, or if the model draws random
                numbers that are not the same on all ranks.
        """
        self.answer_hooks(root)
        before = generator_states()
        leaves, structure = flattened((args, kwargs), class_name(root))
        kind = self.recorder.kind(root, leaves, structure) if self.recorder is not None else None
        leaves, differing, replay = self._enter(root, leaves, before, kind is not None and kind.is_ready)

        def body(leaves: list[Any]) -> Any:
            args, kwargs = restored(leaves, structure)
            refused = gathers_refused(self.fallback == "refuse")
            with inside_model(self.group), refused, casts_of_its_own(), as_written():
                return self.leave(forward(*args, **kwargs), class_name(root))

        recording = self.recorder.found(kind, leaves) if replay else None  # type: ignore[union-attr, arg-type]
        output = body(leaves) if recording is None else recording(leaves)
        if recording is None:
            make_buffers_whole(root)
            refuse_side_doors(root)
            if kind is not None:
                self.recorder.learn(root, kind, body, leaves)  # type: ignore[union-attr]
        now = generator_states() if differing else before
        drawn = [GENERATORS[i] for i in differing if now[i] != before[i]]
        if drawn:
            raise DomainParallelError(
                f"{type(root).__name__} draws random numbers (dropout?), and the domain ranks' generators of "
                f"{', '.join(drawn)} differ, so these are not the numbers of one device. Seed them alike on all ranks "
                f"of a domain group: torch.manual_seed, random.seed, numpy.random.seed."
            )
        return output

    def _enter(
        self, root: nn.Module, leaves: list[Any], generators: tuple[Any, ...], is_ready: bool
    ) -> tuple[list[Any], list[int], bool]:
        """What the model is given, which generators differ between the ranks, and whether all ranks are ready."""
        fields = [leaf for leaf in leaves if self.is_field(leaf)]
        if not 0 < len(fields) <= MAX_SHARDED_INPUTS:
            raise DomainParallelError(
                f"{type(root).__name__} got {len(fields)} fields, which must be 1 to {MAX_SHARDED_INPUTS}. A field has "
                f"a batch axis, a channel axis and all axes from {self.shard_dim} on; anything else is taken for whole."
            )
        rest = (root.training, torch.is_grad_enabled(), *(self._describe(leaf) for leaf in leaves))
        numbers = [leaf.shape[self.shard_dim] | _order_code(leaf) << 32 | is_ready << _READY for leaf in fields]
        padding = [-1] * (MAX_SHARDED_INPUTS - len(numbers))
        rows = gather_numbers([_digest(rest), *map(_digest, generators), *numbers, *padding], self.group)
        if len({(row[0], row.count(-1)) for row in rows}) > 1:
            self._refuse_disagreement(root, rest)
        first = 1 + len(generators)
        all_ready = all(row[first] >> _READY for row in rows)
        columns = iter([[row[first + i] & ~(1 << _READY) for row in rows] for i in range(len(fields))])
        name = f"inputs of {type(root).__name__}"
        entered = [self._slab(leaf, next(columns), name) if self.is_field(leaf) else leaf for leaf in leaves]
        differing = [i for i in range(len(generators)) if len({row[1 + i] for row in rows}) > 1]
        return entered, differing, all_ready

    def _slab(self, x: Tensor, numbers: list[int], name: str) -> Slab:
        length = check_lengths([number & 0xFFFFFFFF for number in numbers], self.group, name)
        slab = Slab(x, x.ndim + self.shard_dim, Partition(length, self.group.size), self.group)
        shape = [*x.shape]
        shape[slab.cut] = length
        # As the first rank stores its rows: another may have but one, of which the order is not seen.
        slab.strides = _strides(tuple(shape), numbers[0] >> 32)
        return slab

    def leave(self, output: Any, of: str = "a sharded model") -> Any:
        """This rank's rows of the fields in `output`, whatever holds them; `of` as in `opened`."""
        found = opened(output, of)
        return closed(tree_map(lambda x: self.left(x)[0], found, is_leaf=lambda x: isinstance(x, Tensor)))

    def left(self, x: Any) -> tuple[Any, int | None]:
        """What leaves of one value, and the length of the whole if that is cut."""
        x = as_whole(x)
        if not isinstance(x, Tensor):
            return x, None
        length = x.shape[self.shard_dim] if self.is_field(x) else 0
        is_cut = length >= self.group.size
        if isinstance(x, Slab):
            if type(x) is not Slab:
                with rules_of(type(x)):
                    refuse("leaving the model", "its output must be whole but for its rows")
            if is_cut:
                return plain(reshard(x, x.ndim + self.shard_dim)).local, length
            return Once.apply(whole(x), self.group), None
        if is_cut:
            rows = Partition(length, self.group.size).range(self.group.rank)
            return x.narrow(self.shard_dim, rows.start, len(rows)), length
        return Once.apply(x, self.group), None

    def _describe(self, leaf: Any) -> Any:
        """What must agree across the domain group, and may decide a model's path through its layers."""
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, bool | int | float | str | type(None)) else type(leaf).__name__
        shape = list(leaf.shape)
        if self.is_field(leaf):
            shape[self.shard_dim] = -1
            return (*shape, str(leaf.dtype), leaf.requires_grad)
        return (*shape, str(leaf.dtype), leaf.requires_grad, _content(leaf))

    def _refuse_disagreement(self, root: nn.Module, rest: tuple[Any, ...]) -> None:
        described = gather_texts(str(rest), self.group)
        lines = "\n".join(f"  domain rank {rank}: {text}" for rank, text in enumerate(described))
        raise DomainParallelError(
            f"{type(root).__name__}: the domain ranks were given different inputs. Apart from the rows of a field "
            f"they must be equal in shape, type and mode: domain peers need the same batch, see "
            f"data_parallel_coords.\n{lines}"
        )


def _content(x: Tensor) -> int | None:
    """A digest of the values of `x`; None where there are none."""
    if x.device.type == "meta" or x.layout is not torch.strided:
        return None
    x = x.detach().resolve_conj().resolve_neg()
    if x.device.type != "cpu":
        return int(torch.hash_tensor(torch.view_as_real(x) if x.is_complex() else x))
    return digest(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _order_code(x: Tensor) -> int:
    """The axes in the order of memory, slowest first, as hexadecimal digits; 0 if that is their own order."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda axis: -strides[axis])
    return 0 if order == [*range(x.ndim)] or x.ndim > 7 else sum(axis << 4 * i for i, axis in enumerate(order))


def _strides(shape: tuple[int, ...], code: int) -> tuple[int, ...] | None:
    if not code:
        return None
    order = [code >> 4 * i & 15 for i in range(len(shape))]
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def _digest(value: Any) -> int:
    return digest(repr(value).encode())
