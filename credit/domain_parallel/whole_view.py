"""Results that torch would call views of a slab: slabs that share its memory or know it, and whole tensors that do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.outcome import shares
from credit.domain_parallel.slab import Slab, answers, refuse
from credit.domain_parallel.storage import Memory, Place, View, everything, expanded, repeated, stored
from credit.domain_parallel.torch_private import make_wrapper_subclass, torch_function_off


def viewed(view: View, x: Tensor, moved: bool, strides: tuple[int, ...] | None) -> Tensor:
    """`x`, which torch would call a view, as one.

    Args:
        view: whose `place` is on the whole base.
        moved: its rows came from other ranks, on some rank at least.
        strides: of the view on one device.
    """
    base = view.base
    memory = base.remembered()
    place = view.place if base.place is everything else partial(_composed, base.place, view.place)
    view = View(base, view.read, place, view.detached)
    if isinstance(x, Slab):
        x.strides = strides
        if shares(base._local, x._local):
            if not moved:
                x.memory, x.place, x.detached = memory, view.place, view.detached
                return x
            x._local = x._local.clone()
        if strides is not None and repeated(x.shape, strides):
            x._local = expanded(x._local, repeated(x.shape, strides))
        x.memory = Memory(x._local, tuple(x.shape), (x.cut, x.partition), view)
        return x
    local = stored(x, strides)
    # Of another tensor: one that is given another shape in place stays what it was in memory.
    return WholeView(local.view_as(local), Memory(local, tuple(x.shape), None, view))


def _composed(first: Place, second: Place, x: Tensor) -> Tensor:
    return second(first(x))


class WholeView(torch.Tensor):
    """A whole tensor, the same on every rank, that torch would call a view of a slab: one row of a field, say."""

    memory: Memory
    _local: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, memory: Memory) -> WholeView:
        self = make_wrapper_subclass(
            cls,
            local.shape,
            strides=local.stride(),
            dtype=local.dtype,
            device=local.device,
            requires_grad=local.requires_grad,
        )
        self._local, self.memory = local, memory
        return self

    @property
    def local(self) -> Tensor:
        """Its values, as they are now."""
        self.memory.refresh()
        return self._local

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        slab = next((kind for kind in types if issubclass(kind, Slab)), None)
        if slab is not None:
            return slab.__torch_function__(func, types, args, kwargs)
        with torch_function_off():
            return answers[0](func, args, kwargs or {}, types)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *unused: Any) -> Any:
        refuse(str(func), "it was called from compiled or C++ code, where it cannot be rerouted")


WholeView.__module__ = "torch"


def as_whole(x: Any) -> Any:
    """The plain tensor, from a view of a slab that is whole; anything else as it is."""
    return x.local if isinstance(x, WholeView) else x
