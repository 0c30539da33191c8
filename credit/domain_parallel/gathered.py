"""What has no rule of its own: computed on gathered operands, on every rank alike. Exact, and slower; it is said once.

Functions that draw random numbers draw the same on every rank, as the root of a converted model compares the ranks'
generators. What is changed in place is given back, and views are views.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from credit.domain_parallel.outcome import leaves, replaced, shares, strides_of, tensors_in, view_in
from credit.domain_parallel.reshard import own, whole
from credit.domain_parallel.slab import Slab, is_slab, line_of, name_of, refuse, rules_of, whereabouts
from credit.domain_parallel.storage import View, assign, stored, windows_overlap
from credit.domain_parallel.whole_view import viewed

logger = logging.getLogger(__name__)

REFUSED = {
    **dict.fromkeys(
        ("numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "share_memory_", "set_"),
        "the rows are in the memory of several ranks",
    ),
    **dict.fromkeys(("__set__", "__delete__"), "the attribute belongs to every rank's rows"),
    **dict.fromkeys(
        ("backward", "grad", "register_post_accumulate_grad_hook"), "the loss is known outside of the model alone"
    ),
    **dict.fromkeys(("__reduce_ex__", "__setstate__"), "each rank has its own rows only"),
    **dict.fromkeys(("cond", "while_loop"), "its branches would be traced; an if or a loop of Python does the same"),
    **dict.fromkeys(("_make_dual", "_unpack_dual"), "forward derivatives do not know of the rows on other ranks"),
    "as_strided": "strides count entries of one device's memory",
    "as_strided_": "strides count entries of one device's memory",
}
"""What cannot be done on gathered operands, by the name of the function, and why."""


class Crossing(NamedTuple):
    """How tensors become whole, and are cut again, around what is computed on whole ones.

    Attributes:
        enter: the whole of a slab.
        leave: a rank's part of a result that has the axis which is cut, as `reshard.own` gives it.
        stay: what becomes of a result that is whole.
    """

    enter: Callable[[Slab], Tensor]
    leave: Callable[[Tensor, int, Slab], Tensor]
    stay: Callable[[Tensor, Slab], Tensor]


LINEAR = Crossing(whole, own, lambda x, like: x)
"""Each rank has a part of the cotangent, and the parts that come of them add up: for derivatives, which are linear."""


@dataclass(frozen=True)
class Gather:
    """A call that was computed on gathered operands.

    Attributes:
        call: the torch function.
        module: path of the module it was called in.
        place: the line of code.
        bytes: size of the operands that were gathered.
    """

    call: str
    module: str
    place: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.module}: {self.call} has no sharded form; {self.bytes / 2**20:.1f} MiB gathered.{self.place}"


class _State(threading.local):
    """Of the rank in this thread: what is seen of gathers, and whether there may be any."""

    recorded: list[Gather] | None = None
    refused = False


_state = _State()
_said: set[Any] = set()


@contextmanager
def gathers_recorded() -> Iterator[list[Gather]]:
    """While it lasts, gathers of this rank are listed, one a line of code, and not logged."""
    before, _state.recorded = _state.recorded, []
    try:
        yield _state.recorded
    finally:
        _state.recorded = before


@contextmanager
def gathers_refused(refused: bool) -> Iterator[None]:
    """While it lasts, what would be gathered is refused, if `refused`."""
    before, _state.refused = _state.refused, refused
    try:
        yield
    finally:
        _state.refused = before


def refuse_memory(func: Any) -> None:
    """If it cannot be done on whole values: it asks for memory that no rank has, or for derivatives.

    Raises:
        DomainParallelError: if so.
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    if name in REFUSED or getattr(func, "__module__", "") == "torch.autograd":
        refuse(name_of(func), REFUSED.get(name, REFUSED["grad"]))


def refuse_together(func: Any) -> NoReturn:
    """As it has changed several copies of what torch holds once."""
    refuse(name_of(func), "it changes several views of one field", "Change them one after the other.")


def gathered(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reason: str = "it has no rule for such arguments",
    crossing: Crossing = LINEAR,
) -> Any:
    """func(*args, **kwargs) on whole operands; where that is not wanted, it is refused for this reason.

    Raises:
        DomainParallelError: if that would not be exact.
        what torch raises.
    """
    refuse_memory(func)
    slabs = {id(x): x for x in leaves((args, kwargs)) if is_slab(x)}
    if not slabs:
        refuse(name_of(func), "it was given fields where they are not found")
    if _state.refused or not all(type(x) is Slab for x in slabs.values()):
        refuse(name_of(func), reason)
    with _changes_counted():
        wholes = {key: _as_stored(x, crossing) for key, x in slabs.items()}
        _tell(func, sum(x.nbytes for x in wholes.values()), next(iter(slabs.values())))
        versions = {key: x._version for key, x in wholes.items()}
        found = _on_wholes(func, args, kwargs, wholes)
    changed = [key for key, x in wholes.items() if x._version != versions[key]]
    if any(shares(slabs[a], slabs[b]) for a in changed for b in changed if a != b):
        refuse_together(func)
    for key in changed:
        _give_back(slabs[key], wholes[key], func, crossing)

    def view(x: Tensor, number: int, base: Slab) -> Tensor:
        result = _cut_like(x, base, crossing)
        again = partial(_made_again, func, args, kwargs, number, result, crossing)
        place = view_in(base, func, args, kwargs, number)
        return viewed(View(base, again, place, base.detached), result, True, strides_of(x))

    def cut(x: Tensor, number: int) -> Tensor:
        for key, operand in wholes.items():
            if x is operand:
                return slabs[key]
            if shares(operand, x):
                return view(x, number, slabs[key])
        return _cut_like(x, next(iter(slabs.values())), crossing)

    results = {id(x): cut(x, number) for number, x in enumerate(tensors_in(found))}
    return replaced(found, lambda x: results[id(x)])


def _on_wholes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wholes: dict[int, Tensor]) -> Any:
    args, kwargs = replaced((args, kwargs), lambda x: wholes.get(id(x), x))
    return func(*args, **kwargs)


def _made_again(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, like: Tensor, crossing: Crossing
) -> Tensor:
    """This rank's part of a result that is a view."""
    with rules_of(Slab, func):
        slabs = [x for x in tensors_in((args, kwargs)) if is_slab(x)]
        found = _on_wholes(func, args, kwargs, {id(x): _as_stored(x, crossing) for x in slabs})
        x = tensors_in(found)[number]
        return crossing.leave(x, like.cut, like) if isinstance(like, Slab) else crossing.stay(x, slabs[0])


@contextmanager
def _changes_counted() -> Iterator[None]:
    """Outside of inference mode, in which changes in place are not counted."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _as_stored(x: Slab, crossing: Crossing) -> Tensor:
    """The whole of `x`, as one device would hold it."""
    found = crossing.enter(x)
    return found if x.strides is None else stored(found, x.strides)


def _give_back(target: Slab, whole: Tensor, func: Any, crossing: Crossing) -> None:
    """Change `target` in place to what `whole`, made of it, was changed to."""
    if whole.shape != target.shape:
        refuse(name_of(func), "it changes the shape of a field in place")
    if target.strides is not None and windows_overlap(target.shape, target.strides):
        refuse(f"{name_of(func)} on windows that overlap", "torch leaves open what comes of it")
    assign(target.local, crossing.leave(whole, target.cut, target))
    target.changed()


def _cut_like(x: Tensor, like: Slab, crossing: Crossing) -> Tensor:
    """`x`, whole, cut as `like` is where it has such an axis."""
    if x.ndim != like.ndim or x.shape[like.cut] != like.shape[like.cut] or x.layout is not torch.strided:
        return crossing.stay(x, like)
    cut = like.like(crossing.leave(x, like.cut, like).clone())  # a part of it would keep the whole
    cut.strides = strides_of(x)
    return cut


def _tell(func: Any, size: int, slab: Slab) -> None:
    key = (name_of(func), line_of(sys._getframe(1)))
    if _state.recorded is not None:
        if all((one.call, one.place) != key for one in _state.recorded):
            module, _ = whereabouts(sys._getframe(1))
            _state.recorded.append(Gather(name_of(func), module, key[1], size))
    elif slab.group.rank == 0 and key not in _said:
        _said.add(key)
        module, place = whereabouts(sys._getframe(1))
        logger.warning("%s", Gather(name_of(func), module, place, size))
