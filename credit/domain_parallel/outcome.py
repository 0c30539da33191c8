"""What torch would return for whole tensors: shapes, strides, and which results are views. Found without values.

All of it follows from the global shapes and strides of the operands, so every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit.domain_parallel.autocast import casts
from credit.domain_parallel.torch_private import no_dispatch_modes

MAX_KNOWN = 10_000


class Outcome(NamedTuple):
    """One tensor that a call returns.

    Attributes:
        strides: None if it is contiguous.
        base: the number of the operand of which it is a view, None for a new tensor.
        same: it is that operand.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    base: int | None
    same: bool


_known: dict[Any, list[Outcome] | None] = {}


def leaves(x: Any) -> Iterable[Any]:
    """The tensors and values in (nested) tuples, lists and dictionaries, in order."""
    if isinstance(x, tuple | list):
        for one in x:
            yield from leaves(one)
    elif isinstance(x, dict):
        for one in x.values():
            yield from leaves(one)
    else:
        yield x


def replaced(x: Any, change: Any) -> Any:
    """`x` with every tensor changed, wherever tuples, lists and dictionaries hold it."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        changed = [replaced(one, change) for one in x]
        return type(x)(*changed) if hasattr(x, "_fields") else type(x)(changed)
    if isinstance(x, dict):
        return {name: replaced(one, change) for name, one in x.items()}
    return x


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors among the `leaves` of `x`."""
    found: list[Tensor] = []
    _collect(x, found)
    return found


def _collect(x: Any, found: list[Tensor]) -> None:
    if isinstance(x, Tensor):
        found.append(x)
    elif isinstance(x, tuple | list):
        for one in x:
            if type(one) not in _VALUES:
                _collect(one, found)
    elif isinstance(x, dict):
        _collect(tuple(x.values()), found)


def _is_constant(x: Any) -> bool:
    kind = type(x)
    return kind in _VALUES or kind is slice or x is Ellipsis or (kind is tuple and all(map(_is_constant, x)))


class _Base(NamedTuple):
    """Stands for the base of a view among the arguments."""


def view_in(
    base: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int
) -> Callable[[Tensor], Tensor]:
    """The `number`-th tensor that func(*args, **kwargs) gives, as a function of `base`, which it does not keep."""
    if args and args[0] is base and not kwargs and _is_constant(args[1:]):  # for speed
        return partial(_of_first, func, args[1:], number)
    args, kwargs = replaced((args, kwargs), lambda x: _Base() if x is base else x)
    return partial(_with_base, func, args, kwargs, number)


def _of_first(func: Any, rest: tuple[Any, ...], number: int, base: Tensor) -> Tensor:
    return tensors_in(func(base, *rest))[number]


def _with_base(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, base: Tensor) -> Tensor:
    found = func(*_filled(args, base), **{name: _filled(x, base) for name, x in kwargs.items()})
    return tensors_in(found)[number]


def _filled(x: Any, base: Tensor) -> Any:
    if isinstance(x, _Base):
        return base
    return type(x)(_filled(one, base) for one in x) if isinstance(x, tuple | list) else x


def outcomes(func: Any, args: Any, kwargs: Any) -> list[Outcome] | None:
    """The tensors that func(*args, **kwargs) returns; None where torch cannot tell without values.

    Raises:
        what torch raises for such operands.
    """
    key = (func, casts(), *map(_token, args), *((name, _token(x)) for name, x in kwargs.items()))
    try:
        return _known[key]
    except KeyError:
        pass
    if len(_known) > MAX_KNOWN:
        _known.clear()
    _known[key] = found = _find(func, args, kwargs)
    return found


def strides_of(x: Tensor) -> tuple[int, ...] | None:
    """None if `x`, whole, is contiguous."""
    if hasattr(x, "partition"):  # a slab
        return x.strides  # type: ignore[attr-defined]
    return None if x.layout is not torch.strided or x.is_contiguous() else x.stride()


_VALUES = frozenset((int, float, bool, str, type(None)))


def _token(x: Any) -> Any:
    kind = type(x)
    if kind in _VALUES:
        return kind, x
    if isinstance(x, Tensor):
        return x.shape, strides_of(x), x.dtype, x.layout, x.is_conj()
    if kind is tuple or isinstance(x, tuple | list):
        return kind, *map(_token, x)
    if isinstance(x, dict):
        return tuple((name, _token(one)) for name, one in x.items())
    if isinstance(x, slice):
        return "slice", _token(x.start), _token(x.stop), _token(x.step)
    return type(x), x


def _find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Outcome] | None:
    operands: list[Tensor] = []

    def empty(x: Tensor) -> Tensor:
        if x.layout is not torch.strided:
            raise NotImplementedError("sparse tensors")
        strides = strides_of(x)
        # Autocast, which does not see tensors without values, would make operands of one type of these.
        kind = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) and casts() else x.dtype
        meta = torch.empty(x.shape, dtype=kind, device="meta")
        if strides is not None:
            meta = torch.empty_strided(x.shape, strides, dtype=kind, device="meta")
        operands.append(meta)
        return meta

    try:
        # Who counts operations or memory in a dispatch mode, or records them, is not to see these.
        with torch.no_grad(), no_dispatch_modes():
            given = replaced((args, kwargs), empty)
            if func.__name__.endswith("_like") and "device" in kwargs:
                given[1]["device"] = "meta"  # nothing is drawn
            found = func(*given[0], **given[1])
    except NotImplementedError:
        return None
    if _keeps_channels_last(func, args, kwargs) and any(map(_is_channels_last, operands[:2])):
        found = found.contiguous(memory_format=_CHANNELS_LAST[found.ndim])
    return [_outcome(x, operands) for x in tensors_in(found)]


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _keeps_channels_last(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Functions that store their result like that, which torch (2.13) does not say without values."""
    name = func.__name__
    if name == "pad":
        return any(x in ("reflect", "replicate") for x in (*args, *kwargs.values()) if isinstance(x, str))
    return name in ("group_norm", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")


def convolved_strides(shape: tuple[int, ...], x: Any, weight: Tensor) -> tuple[int, ...] | None:
    """How torch stores the convolution, of this shape, of the slab `x`."""
    with no_dispatch_modes():
        given = [torch.empty_strided(x.shape, x.strides, device="meta")] if x.strides is not None else []
        if not any(map(_is_channels_last, [*given, weight])) or len(shape) not in _CHANNELS_LAST:
            return None
        return torch.empty(shape, device="meta", memory_format=_CHANNELS_LAST[len(shape)]).stride()


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim in _CHANNELS_LAST and not x.is_contiguous() and x.is_contiguous(memory_format=_CHANNELS_LAST[x.ndim])


def _outcome(x: Tensor, operands: list[Tensor]) -> Outcome:
    base = next((i for i, operand in enumerate(operands) if shares(operand, x)), None)
    same = base is not None and operands[base] is x
    return Outcome(tuple(x.shape), None if x.is_contiguous() else x.stride(), x.dtype, base, same)


def shares(a: Tensor, b: Tensor) -> bool:
    """True if `a` and `b` are in one piece of memory."""
    if hasattr(a, "partition") or hasattr(b, "partition"):  # slabs, whose memory is remembered once there are views
        memories = [getattr(x, "memory", None) for x in (a, b)]
        return a is b or (None not in memories and memories[0].root is memories[1].root)  # type: ignore[union-attr]
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
