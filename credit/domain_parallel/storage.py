"""Which slabs torch would call views of one another, and what a change in place does to the others.

Where a rank's rows of a view are a part of its rows of the base, they share memory, and torch sees to everything.
Where they came from other ranks they are a copy. A `Memory` is such a piece of memory; it knows the slab that it is a
view of. A change goes to the base at once, through the chain of views; a copy is filled anew when it is next read, if
anything was changed meanwhile. (So does torch's functionalization, torch/_subclasses/functional_tensor.py.)

That a slab is read or changed is known to every rank alike, from the code that all run; so is which slab is a view of
which, from global shapes and strides. No address and no reference count is looked at to decide on a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from credit.domain_parallel.partition import Partition

if TYPE_CHECKING:
    from credit.domain_parallel.slab import Slab


class View(NamedTuple):
    """How a copy was made.

    Attributes:
        base: the slab of which torch would call it a view.
        read: makes this rank's part of the view anew.
        positions: the place in the flattened base, for each entry of the whole view.
        cut: along which axis of the view and how, None if it is whole.
    """

    base: Slab
    read: Callable[[], Tensor]
    positions: Callable[[], Tensor]
    cut: tuple[int, Partition] | None


class Memory:
    """One piece of memory of this rank.

    Attributes:
        root: that of the tensor that all are views of; `changes` is counted there alone.
        seen: the changes that this copy has in it.
        local: the copy.
    """

    def __init__(self, local: Tensor, view: View | None = None) -> None:
        self.local, self.view = local, view
        self.root: Memory = self if view is None else view.base.memory.root  # type: ignore[union-attr]
        self.changes = 0
        self.seen = self.root.changes

    def refresh(self) -> None:
        """Fill the copy anew, if anything was changed since it was filled."""
        if self.view is None or self.seen == self.root.changes:
            return
        with torch.set_grad_enabled(self.local.requires_grad or self.view.base.local.requires_grad):
            self.local.copy_(self.view.read())
        self.seen = self.root.changes

    def changed(self) -> None:
        """Tell the base, and its own, what was changed here in place."""
        self.root.changes += 1
        chain = [self]
        while chain[-1].view is not None:
            chain.append(chain[-1].view.base.memory)  # type: ignore[arg-type]
        for memory in chain:
            memory.seen = self.root.changes
        for memory in chain[:-1]:
            memory._write_back(memory.view)  # type: ignore[arg-type]

    def _write_back(self, view: View) -> None:
        from credit.domain_parallel.reshard import own, whole

        positions = view.positions().flatten()
        if positions.unique().numel() < positions.numel():
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location. Please clone() the tensor before performing the operation."
            )
        base = view.base
        mine = self.local if view.cut is None else whole(type(base)(self.local, *view.cut, base.group))
        flat = whole(base).reshape(-1).index_copy(0, positions.to(mine.device), mine.reshape(-1))
        base._local.copy_(own(flat.view(tuple(base.shape)), base.cut, base))


def positions_in(base: Slab, func: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """The place in the flattened base of each entry of func(base), a view."""
    shape = tuple(base.shape)

    def find() -> Any:
        with torch.no_grad():
            return func(torch.arange(base.numel()).view(shape))

    return find
