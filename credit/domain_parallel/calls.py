"""How a torch function that meets slabs is answered: by its rule, or on gathered operands.

Whatever answers, what torch would call a view is one (see `storage`), a change in place is told to whoever shares the
memory, and the strides of the whole are known.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit.domain_parallel.functions import custom, is_custom
from credit.domain_parallel.gathered import gathered, refuse_memory, refuse_together
from credit.domain_parallel.halo_exchange import moves
from credit.domain_parallel.outcome import (
    Outcome,
    leaves,
    outcomes,
    replaced,
    shares,
    strides_of,
    tensors_in,
    view_in,
)
from credit.domain_parallel.partition import PartitionError
from credit.domain_parallel.slab import ASKS, COMPOSITE, RULES, Declined, Slab, answers, is_slab, rules_of
from credit.domain_parallel.storage import View, is_as_it_was, state_of
from credit.domain_parallel.torch_private import torch_function_off, torch_function_on
from credit.domain_parallel.whole_view import WholeView, as_whole, viewed

POINTWISE: set[Any] = set()
"""Functions of corresponding entries: new tensors of contiguous operands are contiguous."""

VIEWS = """
__getitem__ adjoint atleast_1d atleast_2d atleast_3d bfloat16 bool broadcast_tensors broadcast_to byte char chunk
conj contiguous cpu cuda detach diagonal double dropout dsplit einsum expand expand_as feature_dropout flatten float
half hsplit imag int long meshgrid moveaxis movedim narrow permute positive __pos__ ravel real reshape reshape_as
resolve_conj resolve_neg select short split split_with_sizes squeeze sum_to_size swapaxes swapdims t tensor_split to
transpose type type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as view_as_complex
view_as_real vsplit H T mH mT data __iter__ dropout1d dropout2d dropout3d alpha_dropout
"""
"""Names of functions that may return views of what they are given."""


class _Traits(NamedTuple):
    """What is known of a function from its name and signature.

    Attributes:
        views: it may return a view.
        detaches: what it returns has no gradient.
        first: it changes its first argument in place.
        flag: (position, name) of the argument that makes it do so, if there is one.
    """

    views: bool
    detaches: bool
    first: bool
    flag: tuple[int, str] | None


@cache
def _traits(func: Any) -> _Traits:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = func.__self__.__name__
    changes = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    changes = (changes and name != "__iter__") or name == "__setitem__" or (name.endswith("_") and name[-2:-1] != "_")
    flag = None
    if inspect.isfunction(func):
        names = [*inspect.signature(func, follow_wrapped=False).parameters]
        flag = (names.index("inplace"), "inplace") if "inplace" in names else None
    return _Traits(name in VIEWS.split(), name in ("detach", "data"), changes, flag)


def changed_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call changes in place."""
    traits, found = _traits(func), []
    if traits.first or (traits.flag and _flag_of(args, kwargs, *traits.flag)):
        found = [args[0] if args else kwargs.get("input", kwargs.get("self"))]
    if kwargs and kwargs.get("out") is not None:
        found.extend(leaves(kwargs["out"]))
    return found


def _flag_of(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, False)


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], types: Any = ()) -> Any:
    """func(*args, **kwargs), where some arguments are slabs; `types` are those of what torch hands over to."""
    rule = RULES.get(func)
    if WholeView in types:
        return _with_whole_views(func, args, kwargs)
    if func in ASKS:
        return rule(*args, **kwargs)  # type: ignore[misc]
    if rule is None or (kwargs and kwargs.get("out") is not None):
        composite = COMPOSITE.get(func)
        if composite is not None:
            with torch_function_on():
                return composite(*args, **kwargs)
        slab = next(filter(is_slab, leaves((args, kwargs))), None) if is_custom(func) else None
        return gathered(func, args, kwargs) if slab is None else custom(func, args, kwargs, slab.group)
    traits = _traits(func)
    expected = None
    if traits.views or func not in POINTWISE or _strided(args):
        try:
            with torch_function_off():
                expected = outcomes(func, args, kwargs)
        except Exception:  # torch's word on such operands is that on real ones: it raises, or was wrong without values
            return gathered(func, args, kwargs)
    before = moves()
    try:
        found = rule(*args, **kwargs)
    except (Declined, PartitionError) as error:
        return gathered(func, args, kwargs, str(error))
    if expected is not None and not traits.first:
        found = _finished(func, args, kwargs, found, expected, moves() != before)
    for target in changed_by(func, args, kwargs) if traits.first or traits.flag else ():
        if isinstance(target, Slab):
            target.changed()
    return found


answers.append(answer)


def _strided(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and strides_of(x) is not None for x in args)


def _finished(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any, expected: list[Outcome], moved: bool
) -> Any:
    """What a rule found, with strides, and views of what they are views of."""
    results = tensors_in(found)
    _compare(func, results, expected)
    operands = tensors_in((args, kwargs))
    finished = [
        _as_expected((func, args, kwargs, i), x, one, operands, moved)
        for i, (x, one) in enumerate(zip(results, expected, strict=True))
    ]
    if isinstance(found, Tensor):
        return finished[0]
    if all(x is y for x, y in zip(results, finished, strict=True)):
        return found
    in_order = iter(finished)
    return replaced(found, lambda _: next(in_order))


def _as_expected(call: tuple[Any, ...], x: Tensor, one: Outcome, operands: list[Tensor], moved: bool) -> Tensor:
    """`x`, the result of a call (function, args, kwargs, number of the result), with strides, and as a view if it is
    one."""
    base = None if one.base is None else operands[one.base]
    if is_slab(base):
        if one.same:
            return base
        detached = base.detached or _traits(call[0]).detaches
        x = base.like(base.local) if x is base else x
        view = View(base, partial(_again, type(base), *call), view_in(base, *call), detached)
        return viewed(view, x, moved, one.strides)
    if is_slab(x):
        if any(y is x or (is_slab(y) and shares(y._local, x._local)) for y in operands):
            x = x.like(x.local.clone())  # its rows needed no change here, and are not to be shared
        x.strides = one.strides
    return x


def _compare(func: Any, results: list[Tensor], expected: list[Outcome]) -> None:
    """A rule that gives another shape or type than torch is wrong. (Autocast does not see tensors without values.)"""
    if len(results) != len(expected) or any(
        x.shape != one.shape or (x.dtype != one.dtype and not _is_autocast())
        for x, one in zip(results, expected, strict=True)
    ):
        ours, theirs = [(tuple(x.shape), x.dtype) for x in results], [(one.shape, one.dtype) for one in expected]
        raise AssertionError(f"{func}: its rule gives {ours}, torch {theirs}")


def _is_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled()


def _again(kind: type[Slab], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> Tensor:
    """This rank's part of the i-th result, made anew."""
    with rules_of(kind, func):
        found = tensors_in(RULES[func](*args, **kwargs))[i]
    return found.local if isinstance(found, Slab) else found


def _with_whole_views(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On their values. What was changed in place is seen on them, as no name tells: a list of them, an operator's."""
    refuse_memory(func)
    views = [x for x in leaves((args, kwargs)) if isinstance(x, WholeView)]
    plain_args, plain_kwargs = replaced((args, kwargs), as_whole)
    before = [(state_of(x._local), x.memory.root.changes) for x in views]
    if any(isinstance(x, Slab) for x in leaves((plain_args, plain_kwargs))):
        found = answer(func, plain_args, plain_kwargs)
    else:
        found = func(*plain_args, **plain_kwargs)
    pairs = zip(views, before, strict=True)
    changed = [(x.memory, changes) for x, (state, changes) in pairs if not is_as_it_was(x._local, state)]
    memories = {memory for memory, _ in changed}
    roots = {memory.root for memory in memories}
    if len(memories) > len(roots) or any(memory.root.changes > changes for memory, changes in changed):
        refuse_together(func)
    for memory in memories:
        memory.changed()

    def viewed_again(x: Tensor) -> Tensor:
        if isinstance(x, Slab | WholeView):
            return x
        for view in views:
            if x is view._local:
                return view
            if shares(view._local, x):
                return WholeView(x, view.memory)
        return x

    return replaced(found, viewed_again) if isinstance(found, Tensor | tuple | list) else found
