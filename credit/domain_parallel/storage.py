"""Which slabs torch would call views of one another, and what a change in place does to the others.

Where a rank's rows of a view are a part of its rows of the base, they share memory, and torch sees to everything.
Where they came from other ranks they are a copy. A `Memory` is such a piece of memory, with the tensor that owns it; a
copy knows what it is a view of. A change goes to the base at once, through the chain of views; a copy is filled anew
when it is next read, if anything was changed meanwhile. (So does torch's functionalization,
torch/_subclasses/functional_tensor.py.)

That a slab is read or changed is known to every rank alike, from the code that all run; so is which slab is a view of
which, from global shapes and strides. No address and no reference count is looked at to decide on a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from credit.domain_parallel.partition import Partition

if TYPE_CHECKING:
    from credit.domain_parallel.slab import Slab

_CLONE = "Clone the view before, or change the tensor itself."

Place = Callable[[Tensor], Tensor]
"""A view, as a function of the whole tensor that owns the memory."""


def everything(x: Tensor) -> Tensor:
    """The view that is the tensor itself."""
    return x


class View(NamedTuple):
    """How a copy was made.

    Attributes:
        base: the slab of which torch would call it a view.
        read: makes this rank's part of the view anew.
        place: the same view of the whole tensor that owns the memory of `base`.
        detached: no gradient goes from the view to the base.
    """

    base: Slab
    read: Callable[[], Tensor]
    place: Place
    detached: bool


class Memory:
    """One piece of memory of this rank.

    Attributes:
        local: this rank's part of the tensor that owns it, which is `cut` along an axis, or whole (None).
        shape: of that whole tensor.
        root: the memory of the tensor that all are views of; `changes` is counted there alone.
        seen: the changes that this copy has in it.
    """

    def __init__(
        self, local: Tensor, shape: tuple[int, ...], cut: tuple[int, Partition] | None, view: View | None = None
    ) -> None:
        self.local, self.shape, self.cut, self.view = local, shape, cut, view
        self._root = None if view is None else _of(view.base).root  # not itself: a cycle would outlive its use
        self.changes = 0
        self.seen = self.root.changes

    @property
    def root(self) -> Memory:
        return self if self._root is None else self._root

    def refresh(self) -> None:
        """Fill the copy anew, if anything was changed since it was filled."""
        if self.view is None or self.seen == self.root.changes:
            return
        with torch.set_grad_enabled(self.local.requires_grad or self.view.base.local.requires_grad):
            once_each(self.local, like=self.local).copy_(once_each(self.view.read(), like=self.local))
        self.seen = self.root.changes

    def changed(self, detached: bool = False) -> None:
        """Tell the base, and its own, what was changed here in place; by a tensor without their gradients, perhaps."""
        self.root.changes += 1
        chain = [self]
        while chain[-1].view is not None:
            chain.append(_of(chain[-1].view.base))
        for memory in chain:
            memory.seen = self.root.changes
        for memory in chain[:-1]:
            detached = detached or memory.view.detached  # type: ignore[union-attr]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
                memory._write_back(memory.view)  # type: ignore[arg-type]

    def _write_back(self, view: View) -> None:
        from credit.domain_parallel.reshard import own
        from credit.domain_parallel.slab import refuse

        owner, kind, group = _of(view.base), type(view.base), view.base.group
        axes = repeated(owner.local.shape, owner.local.stride())
        mine, base = _whole(self, kind, group), narrowed(_whole(owner, kind, group), axes)
        with torch.no_grad():
            numbers = torch.arange(base.numel(), device=self.local.device).view(base.shape).expand(owner.shape)
            places = view.place(numbers)
        places, mine = (once_each(x, like=self.local).reshape(-1) for x in (places, mine))
        if places.unique().numel() < places.numel():
            refuse("a change in place of windows that overlap", "torch leaves open what comes of it", _CLONE)
        # Not index_copy, which keeps what it was given for its backward.
        changed = base.reshape(-1).index_put((places,), mine).view(base.shape)
        if owner.cut is not None:
            axis, partition = owner.cut
            changed = own(changed, axis, kind(owner.local.detach(), axis, partition, group))
        narrowed(owner.local, axes).copy_(changed)


def _of(slab: Slab) -> Memory:
    assert slab.memory is not None, "a slab that has views has a memory"
    return slab.memory


def _whole(memory: Memory, kind: type[Slab], group: Any) -> Tensor:
    from credit.domain_parallel.reshard import whole

    return memory.local if memory.cut is None else whole(kind(memory.local, *memory.cut, group))


def state_of(x: Tensor) -> Any:
    """By which `is_as_it_was` sees that `x` was changed in place: torch counts that, outside of inference mode."""
    return x.clone() if torch.is_inference_mode_enabled() or x.is_inference() else x._version


def is_as_it_was(x: Tensor, state: Any) -> bool:
    """False if `x` was changed in place since that was its `state_of`."""
    if isinstance(state, Tensor):
        return x.shape == state.shape and torch.equal(x, state)
    return bool(x._version == state)


def stored(x: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """A copy of `x` with these strides, gaps included; contiguous for None, and where entries would share a place."""
    if strides is None:
        return x.clone(memory_format=torch.contiguous_format)
    narrow = narrowed(x, repeated(x.shape, strides))
    if overlap(narrow.shape, strides):
        return x.clone(memory_format=torch.contiguous_format)
    kept = [step or 1 for step in strides]
    return torch.empty_strided(narrow.shape, kept, dtype=x.dtype, device=x.device).copy_(narrow).expand(x.shape)


def repeated(shape: Sequence[int], strides: tuple[int, ...]) -> list[int]:
    """Axes along which all entries are one."""
    return [axis for axis, (length, step) in enumerate(zip(shape, strides, strict=True)) if length > 1 and not step]


def narrowed(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The first entry of `x` along each of `axes`, which stay."""
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    return x


def expanded(x: Tensor, axes: Sequence[int]) -> Tensor:
    """`x`, which repeats itself along `axes`, with one entry there in memory."""
    return narrowed(x, axes).clone().expand(x.shape)


def once_each(x: Tensor, like: Tensor) -> Tensor:
    """`x` without the entries that `like` holds several times in one place."""
    return narrowed(x, repeated(like.shape, like.stride()))


def assign(target: Tensor, values: Tensor) -> None:
    """Change `target`, which may repeat itself along axes, to `values` in place."""
    once_each(target, like=target).copy_(once_each(values, like=target))


def windows_overlap(shape: Sequence[int], strides: tuple[int, ...]) -> bool:
    """True if two entries may have one place, apart from what is repeated along an axis."""
    axes = repeated(shape, strides)
    return overlap([1 if axis in axes else length for axis, length in enumerate(shape)], strides)


def overlap(shape: Sequence[int], strides: tuple[int, ...]) -> bool:
    """True if two entries may have one place."""
    reach = 0
    for step, length in sorted((step, length) for step, length in zip(strides, shape, strict=True) if length > 1):
        if step <= reach:
            return True
        reach += step * (length - 1)
    return False
