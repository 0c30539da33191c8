"""A tensor of which every rank holds its rows, and which a model takes for the whole.

A `Slab` has the shape of the global field. Every torch function that meets one looks up its rule (the modules
of `credit.domain_parallel.rules`), which works on this rank's rows and exchanges what it must; what has no rule, or
no rule for such arguments, is computed on gathered operands (`credit.domain_parallel.gathered`). So a model's own code
never sees a local height, and nothing that mixes rows can pass unnoticed. Plain tensors beside slabs (weights, masks,
positional embeddings) are whole, the same on every rank, and cut where they meet a slab.

Gradients: the cotangent of a plain tensor is the sum over the domain ranks of what each holds, as it is for
weights. Autograd sees the local tensors alone.
"""

from __future__ import annotations

import inspect
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.domain_parallel.binding import bind, declarations
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.storage import Memory, Place, everything
from credit.domain_parallel.torch_private import (
    NN,
    inside_backward,
    make_wrapper_subclass,
    torch_function_off,
    tree_map,
)

RULES: dict[Any, Callable[..., Any]] = {}
"""What a torch function does when one of its arguments is a slab, given the arguments as they are."""

COMPOSITE: dict[Any, Callable[..., Any]] = {}
"""Torch functions written in Python whose own body is run, on slabs."""

ASKS: set[Any] = set()
"""Torch functions whose rules answer about a slab and make no other."""

REMEDIES = {
    "BackwardHookFunction": "Give register_hook of a tensor in the forward what the module's backward hook does.",
    "CheckpointFunction": "Give torch.utils.checkpoint use_reentrant=False.",
    "RegisterPostBackwardFunction": "After fully_shard(module), call show_rows_to_hooks(module) of this package.",
}
"""For functions of torch's own."""

_SIDE_DOOR = "Return it from the model's forward; what a forward keeps elsewhere stays inside."

_NAMESPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "nn": NN,
    "fft": torch.fft,
    "linalg": torch.linalg,
    "special": torch.special,
}
_OWN = ("credit.domain_parallel", "credit.parallel", "torch.", "contextlib", "threading")
"""Modules whose lines are not the model's code."""


def getter(name: str) -> Any:
    """The function by which torch reads that attribute of a tensor."""
    return getattr(torch.Tensor, name).__get__


_local_grad_fn = getter("grad_fn")


class Declined(Exception):
    """A rule has no answer to such arguments."""

    def __str__(self) -> str:
        return super().__str__() or "it has no rule for such arguments"


class _State(threading.local):
    """Of the rank that runs in this thread.

    Attributes:
        kind, func: of the slabs whose rule is running, and the torch function it is for.
        inside: a converted model is running.
        group: the ranks that it runs on.
        refusal: the last refusal in it.
        observer: called with every torch function that meets a slab.
    """

    kind: type[Slab]
    func: Any = None
    inside = False
    group: RankGroup | None = None
    refusal: DomainParallelError | None = None
    observer: Callable[[Any], None] | None = None


_state = _State()

answers: list[Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]] = []
"""How a call that meets slabs is answered; `credit.domain_parallel.calls`, which is made of slabs, puts it here."""


class Slab(torch.Tensor):
    """This rank's part of a global tensor.

    Attributes:
        cut: the axis that is cut, counted from the front.
        partition: how it is cut.
        group: the ranks that share the tensor.
        strides: of the whole tensor, had one device made it; None if that is contiguous.
        memory: where the rows are, once other slabs are views of this one, or it of another; and which view this
            is of the tensor that owns it (`place`), `detached` from its gradients or not.
        shared: rows fetched for several windows at once, see `share_halo`.
    """

    described: ClassVar[str] = "a field cut over ranks"
    remedy: ClassVar[str] = "Replace it, or give the type of the module to custom_converters; or use domain: 1."

    cut: int
    partition: Partition
    group: RankGroup
    strides: tuple[int, ...] | None = None
    memory: Memory | None = None
    place: Place = staticmethod(everything)
    detached: bool = False
    shared: tuple[Any, ...] | None = None
    _local: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, cut: int, partition: Partition, group: RankGroup) -> Slab:
        shape = [*local.shape]
        if shape[cut] != partition.size(group.rank):
            raise AssertionError(f"{shape} does not hold the part of axis {cut} that {partition} gives this rank")
        shape[cut] = partition.length
        self = make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        self._local, self.cut, self.partition, self.group = local, cut, partition, group
        return self

    @property
    def local(self) -> Tensor:
        """This rank's rows, as they are now.

        Raises:
            DomainParallelError: if they are not to be had: the slab came out of a custom autograd function.
        """
        if self.memory is not None and self.memory.view is not None:
            self.memory.refresh()
        with torch_function_off():
            function = _local_grad_fn(self)
            if function is not None:
                name = function.name().removesuffix("Backward")
                refuse(
                    f"a custom torch.autograd.Function, {name}, met before this line,",
                    "its backward does not know of the rows on other ranks",
                    REMEDIES.get(name, ""),
                )
        return self._local

    def like(self, local: Tensor, cut: int | None = None, partition: Partition | None = None) -> Slab:
        """`local` as a slab that is cut like this one, or along `cut` as `partition` says."""
        return type(self)(local, self.cut if cut is None else cut, partition or self.partition, self.group)

    def alias(self, local: Tensor | None = None) -> Slab:
        """Another slab of the same memory; of the same rows, in another tensor, perhaps."""
        other = self.like(self.local if local is None else local)
        other.memory, other.strides = self.remembered(), self.strides
        other.place, other.detached = self.place, self.detached
        return other

    def remembered(self) -> Memory:
        """Its memory, of which there are views from now on."""
        if self.memory is None:
            self.memory = Memory(self._local, tuple(self.shape), (self.cut, self.partition))
        return self.memory

    def changed(self) -> None:
        """To be called when the rows were changed in place: views see it, and gradients may be needed since."""
        if self._local.requires_grad and not self.requires_grad:
            self.requires_grad_(True)
        if self.memory is not None:
            self.memory.changed(self.detached)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _state.observer is not None:
            _state.observer(func)
        before = _state.kind, _state.func
        _state.kind, _state.func = Slab, func  # `rules_of`, in a third of its time
        try:
            with torch_function_off():
                if func not in ASKS:
                    _refuse_outside(func)
                return answers[0](func, args, kwargs or {}, types)
        finally:
            _state.kind, _state.func = before

    @classmethod
    def __torch_dispatch__(cls, func: Any, *unused: Any) -> Any:
        refuse(str(func), "it was called from compiled or C++ code, where it cannot be rerouted")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        with torch_function_off():
            return f"Slab({list(self.shape)}, axis {self.cut} cut as {self.partition.sizes}, {self._local!r})"


# opt_einsum picks the functions it calls by the name of the tensor's module.
Slab.__module__ = "torch"
_State.kind = Slab


@contextmanager
def observed(observer: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, `observer` is called with every torch function that meets a slab of this rank."""
    before, _state.observer = _state.observer, observer
    try:
        yield
    finally:
        _state.observer = before


@contextmanager
def rules_of(kind: type[Slab], func: Any = None) -> Iterator[None]:
    """While a rule (of `func`) runs for slabs of this kind: others are plain tensors to it."""
    before = _state.kind, _state.func
    _state.kind, _state.func = kind, func
    try:
        yield
    finally:
        _state.kind, _state.func = before


@contextmanager
def met(func: Any) -> Iterator[None]:
    """While `func`, of which torch tells no slab, is answered."""
    if _state.observer is not None:
        _state.observer(func)
    with rules_of(Slab, func), torch_function_off():
        _refuse_outside(func)
        yield


def _refuse_outside(func: Any) -> None:
    if not is_inside_model():
        refuse(f"{name_of(func)}, outside of the model that made it,", "it left the model unseen", _SIDE_DOOR)


def name_of(func: Any) -> str:
    """A torch function as it is called."""
    name = torch.overrides.resolve_name(func)
    if name is None and isinstance(func, BuiltinFunctionType):  # which torch lists nowhere
        return f"torch.{func.__name__}"
    return name or (func.__qualname__ if isinstance(func, FunctionType) else str(func))


def running() -> str:
    """The torch function whose rule is running."""
    return name_of(_state.func)


def is_slab(x: Any) -> TypeGuard[Slab]:
    """True if `x` is a slab of the kind that rules run for."""
    return isinstance(x, _state.kind)


class _Opened(NamedTuple):
    """A slab's rows, in place of which hooks may put others, and how to make a slab of them."""

    local: Any
    close_with: Callable[[Tensor], Slab]

    @staticmethod
    def of(x: Slab) -> _Opened:
        return _Opened(_Opened.of(x.local) if isinstance(x.local, Slab) else x.local, x.alias)

    def close(self) -> Slab:
        return self.close_with(self.local.close() if isinstance(self.local, _Opened) else self.local)


def show_rows_to_hooks(module: nn.Module) -> None:
    """Let the forward pre-hooks that `module` has by now see the rows of slabs, as tuples, in place of slabs.

    For hooks that pass tensors through an autograd function of their own, as FSDP2's do.
    """

    def opened(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _each(args, kwargs, Slab, _Opened.of)

    def closed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _each(args, kwargs, _Opened, _Opened.close)

    module.register_forward_pre_hook(opened, prepend=True, with_kwargs=True)
    module.register_forward_pre_hook(closed, with_kwargs=True)


def _each(args: tuple[Any, ...], kwargs: dict[str, Any], kind: type, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    def is_one(x: Any) -> bool:
        return isinstance(x, kind)

    return tree_map(lambda x: change(x) if is_one(x) else x, (args, kwargs), is_leaf=is_one)


def rule(*names: str, **renamed: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rule of torch functions: "conv2d" wherever it is found, "F.pad" there alone.

    Its parameters have the names that torch declares (`input` for the first argument of a method), or those that
    `renamed` gives for some of them. What it does not take is gathered.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            for func in torch_functions(name):
                register_rule(func, bound(func, function, renamed))
        return function

    return register


def register_rule(func: Any, answer: Callable[..., Any]) -> None:
    """Make `answer` the rule of `func`, which has none."""
    if func in RULES:
        raise TypeError(f"{name_of(func)} has two rules")
    RULES[func] = answer


def bound(func: Any, function: Callable[..., Any], renamed: dict[str, str]) -> Callable[..., Any]:
    """`function`, called with the arguments of a call of `func` as torch names them.

    Raises:
        TypeError: if it has parameters that torch does not declare, or swallows some.
    """
    parameters = inspect.signature(function).parameters
    declared = {renamed.get(a.name, a.name): a for one in declarations(func) for a in one.arguments}
    for name, parameter in parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) or name not in declared:
            raise TypeError(f"the rule of {name_of(func)} takes {name}, and torch declares {[*declared]}")
    taken = frozenset(parameters)

    def answer(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None:
            raise Declined
        if renamed:
            given = {renamed.get(name, name): value for name, value in given.items()}
        if not taken.issuperset(given):
            for name in [*given]:
                if name not in taken:
                    if not _is_default(given[name], declared[name].default):
                        raise Declined
                    del given[name]
        return function(**given)

    return answer


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, Tensor) and value == default)


def torch_functions(name: str) -> list[Any]:
    """The functions of that name in torch's namespaces."""
    space, _, bare = name.rpartition(".")
    spaces = [_NAMESPACES[space]] if space else list(_NAMESPACES.values())
    found = [getattr(place, bare) for place in spaces if callable(getattr(place, bare, None))]
    if not found:
        raise LookupError(f"torch has no function {name}")
    return [*dict.fromkeys(found)]


@contextmanager
def inside_model(group: RankGroup | None = None) -> Iterator[None]:
    """While a converted model runs on the ranks of `group`, a plain tensor is whole; outside, it is a shard."""
    before = _state.inside, _state.group
    _state.inside, _state.group, _state.refusal = True, group, None
    try:
        yield
    except RuntimeError as error:
        # Scripted code turns every error into one of its own, without the text.
        raise (_state.refusal or error) from None
    finally:
        (_state.inside, _state.group), _state.refusal = before, None


def is_inside_model() -> bool:
    """True in the forward of a converted model, and when checkpointing runs parts of it again."""
    return _state.inside or inside_backward()


def group_inside() -> RankGroup | None:
    """The ranks of the converted model whose forward is running."""
    return _state.group


def refuse(call: str, reason: str, remedy: str = "") -> NoReturn:
    """Stop with the module, the line of the model's code and the remedy. Every rank meets the same call."""
    module, place = whereabouts(sys._getframe(1))
    kind = _state.kind
    _state.refusal = DomainParallelError(
        f"{module}: {call} cannot be done on {kind.described}: {reason}.{place}\n{remedy or kind.remedy}"
    )
    raise _state.refusal


def line_of(frame: FrameType | None) -> str:
    """The line of the model's code that is being run in `frame` or called it; empty if there is none."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not (name.startswith(_OWN) or name == "torch"):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"\n  {frame.f_code.co_filename}:{frame.f_lineno}: {line}"
        frame = frame.f_back
    return ""


def whereabouts(frame: FrameType | None) -> tuple[str, str]:
    """The innermost module of the model that runs in `frame`, by its path, and the line of code it is at."""
    modules: list[nn.Module] = []
    place = line_of(frame)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module not in modules:
            modules.append(module)
        frame = frame.f_back
    if not modules:
        return "outside of any module", place
    names = {module: name for name, module in modules[-1].named_modules()}
    root = class_name(modules[-1])
    path = names.get(modules[0]) or root
    return f"{path} ({class_name(modules[0])})" if path != root else root, place


def class_name(module: nn.Module) -> str:
    """The name of its class, as it was before the module was converted."""
    return getattr(type(module), "_plain", type(module)).__name__
