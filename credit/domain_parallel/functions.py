"""Custom functions and operators that are given slabs: every rank runs them on whole fields, forward and backward.

What a `torch.autograd.Function`, or an operator that was registered with `torch.library`, does in its backward need not
be a derivative: it may clip or scale by a norm. So its backward is given the whole cotangent, on every rank alike, as
one device would. `Function.apply` asks no tensor whether it wants to be treated otherwise; it is replaced when a model
is converted, and does what it did outside of a converted model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from credit.domain_parallel.gathered import Crossing, gathered
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.outcome import leaves, replaced
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import Once, part, whole
from credit.domain_parallel.slab import REMEDIES, Slab, group_inside, met, refuse
from credit.domain_parallel.torch_private import BackwardHookFunction, unsafe_view
from credit.domain_parallel.whole_view import as_whole

_AS_THEY_ARE = ("credit.domain_parallel.", "credit.parallel.", "torch.")
"""Modules whose functions are left alone: ours, and torch's, which saves with one what a checkpoint is given."""

_TORCHS = ("aten", "prim", "prims")

_UNKNOWN = "its backward does not know of the rows on other ranks"

_apply = Function.__dict__["apply"].__func__
"""As torch has it."""


class _Enter(Function):
    """A field becomes whole; of its gradient, which every rank has whole, each takes its rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, cut: int, partition: Partition, group: RankGroup) -> Tensor:
        ctx.geometry = cut, partition, group
        x = whole(Slab(local, cut, partition, group))
        return unsafe_view(x, x.shape)  # not as a view, which could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cut, partition, group = ctx.geometry
        return part(grad, cut, partition, group.rank), None, None, None


class _Leave(Function):
    """A rank's part of what every rank has whole; its cotangent becomes whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, partition: Partition, group: RankGroup) -> Tensor:
        ctx.geometry = cut, partition, group
        return part(x, cut, partition, group.rank).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return whole(Slab(grad, *ctx.geometry)), None, None, None


class _Stay(Function):
    """A result that is whole; of its cotangent the ranks have parts, which are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad), None


ALIKE = Crossing(
    enter=lambda x: _Enter.apply(x.local, x.cut, x.partition, x.group),
    leave=lambda x, axis, like: _Leave.apply(x, axis, like.partition, like.group),
    stay=lambda x, like: _Stay.apply(x, like.group),
)
"""Cotangents and gradients are whole, and the same on every rank."""


def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """`Function.apply`, of slabs too."""
    if cls is BackwardHookFunction and group_inside() is not None:
        refuse("a backward hook of a module", _UNKNOWN, REMEDIES[cls.__name__])
    if cls.__module__.startswith(_AS_THEY_ARE):
        return _apply(cls, *args, **kwargs)
    slab = next((x for x in leaves((args, kwargs)) if isinstance(x, Slab)), None)
    group = group_inside() if slab is None else slab.group  # a checkpoint calls it in the backward too
    if group is None:
        return _apply(cls, *args, **kwargs)
    call = _called(cls)
    with nullcontext() if slab is None else met(call):
        if slab is not None:
            return custom(call, args, kwargs, group)
        args, kwargs = replaced((args, kwargs), partial(_counted_once, group=group))
        return replaced(_apply(cls, *args, **kwargs), lambda x: _Stay.apply(x, group) if x.requires_grad else x)


def custom(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], group: RankGroup) -> Any:
    """call(*args, **kwargs), of slabs of `group`, whatever its backward does."""
    args, kwargs = replaced((args, kwargs), partial(_counted_once, group=group))
    return gathered(call, args, kwargs, _UNKNOWN, ALIKE)


def is_custom(func: Any) -> bool:
    """True for an operator that is not torch's own."""
    return getattr(func, "namespace", "aten") not in _TORCHS


def _counted_once(x: Tensor, group: RankGroup) -> Tensor:
    """A whole tensor: a weight, say."""
    if isinstance(x, Slab):
        return x
    x = as_whole(x)
    return Once.apply(x, group) if x.requires_grad else x


def _called(cls: type[Function]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _apply(cls, *args, **kwargs)

    call.__qualname__ = f"{cls.__name__}.apply"
    return call


def answer_functions() -> None:
    """From now on slabs may be given to custom functions. Elsewhere they do what they did."""
    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
