"""A tensor of which every rank holds its rows, and which a model takes for the whole.

A `Slab` has the shape of the global field. Every torch function that meets one looks up its rule (the modules
of `credit.domain_parallel.rules`), which works on this rank's rows and exchanges what it must; a function
without a rule is refused with the module, the call and the remedy. So a model's own code never sees a local height,
and nothing that mixes rows can pass unnoticed. Plain tensors beside slabs (weights, masks, positional embeddings) are
whole, the same on every rank, and cut where they meet a slab.

Gradients: the cotangent of a plain tensor is the sum over the domain ranks of what each holds, as it is for
weights. Autograd sees the local tensors alone.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.partition import Partition, Span

RULES: dict[Any, Callable[..., Any]] = {}
"""What a torch function does when one of its arguments is a slab."""

COMPOSITE: dict[Any, Callable[..., Any]] = {}
"""Torch functions written in Python whose own body is run, on slabs."""

ASSIGN = "Assign to the tensor instead: x[rows] = x[rows] + y."
"""The remedy where a slice is changed in place."""

_REMEDIES = {
    "CheckpointFunction": "Give torch.utils.checkpoint use_reentrant=False.",
    "RegisterPostBackwardFunction": "After fully_shard(module), call show_rows_to_hooks(module) of this package.",
}
"""For functions of torch's own."""

_NAMESPACES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "nn": torch._C._nn,
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


class _State(threading.local):
    """Of the rank that runs in this thread.

    Attributes:
        kind, func: of the slabs whose rule is running, and the torch function it is for.
        inside: a converted model is running.
        refusal: the last refusal in it.
        observer: called with every torch function that meets a slab.
    """

    kind: type[Slab]
    func: Any = None
    inside = False
    refusal: DomainParallelError | None = None
    observer: Callable[[Any], None] | None = None


_state = _State()


class Slab(torch.Tensor):
    """This rank's part of a global tensor.

    Attributes:
        cut: the axis that is cut, counted from the front.
        partition: how it is cut.
        group: the ranks that share the tensor.
        shared: rows fetched for several windows at once, see `share_halo`.
        copies: whole tensors that torch would call views of this one, and their versions when they were made.
    """

    described: ClassVar[str] = "a field cut over ranks"
    remedy: ClassVar[str] = "Replace it, or give the type of the module to custom_converters; or use domain: 1."

    cut: int
    partition: Partition
    group: RankGroup
    shared: tuple[Span, Tensor] | None
    copies: list[tuple[Tensor, int]]
    _local: Tensor
    _source: tuple[Tensor, int] | None

    @staticmethod
    def __new__(cls, local: Tensor, cut: int, partition: Partition, group: RankGroup) -> Slab:
        shape = [*local.shape]
        if shape[cut] != partition.size(group.rank):
            raise AssertionError(f"{shape} does not hold the part of axis {cut} that {partition} gives this rank")
        shape[cut] = partition.length
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        self._local, self.cut, self.partition, self.group = local, cut, partition, group
        self._source = self.shared = None
        self.copies = []
        return self

    @property
    def local(self) -> Tensor:
        """This rank's rows.

        Raises:
            DomainParallelError: if they are not to be had: the slab came out of a custom autograd function, or is
                a slice of a tensor that was changed since.
        """
        with torch._C.DisableTorchFunctionSubclass():
            function = _local_grad_fn(self)
            if function is not None:
                name = function.name().removesuffix("Backward")
                refuse(
                    f"a custom torch.autograd.Function, {name}, met before this line,",
                    "its backward does not know of the rows on other ranks",
                    _REMEDIES.get(name, ""),
                )
            if any(copy._version != version for copy, version in self.copies):
                refuse("a tensor of which a slice was changed in place", "the slice was a copy", ASSIGN)
            if self._source is not None and self._source[0]._version != self._source[1]:
                refuse("a slice of a tensor that was then changed in place", "it holds the rows from before")
        return self._local

    def like(self, local: Tensor, cut: int | None = None, partition: Partition | None = None) -> Slab:
        """`local` as a slab that is cut like this one, or along `cut` as `partition` says."""
        return type(self)(local, self.cut if cut is None else cut, partition or self.partition, self.group)

    def remember_source(self, base: Slab) -> Slab:
        """Mark this slab as what torch calls a view of `base`, although its rows are a copy."""
        self._source = (base._local, base._local._version)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        observer = _state.observer
        if observer is not None:
            observer(func)
        rule = RULES.get(func)
        if rule is not None:
            with torch._C.DisableTorchFunctionSubclass(), rules_of(Slab, func):
                return rule(*args, **(kwargs or {}))
        composite = COMPOSITE.get(func)
        if composite is not None:
            return composite(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            refuse(name_of(func), "it has no rule for a field cut over ranks")

    @classmethod
    def __torch_dispatch__(cls, func: Any, *unused: Any) -> Any:  # type: ignore[override]
        refuse(str(func), "it was called from compiled or C++ code, where it cannot be rerouted")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
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


def name_of(func: Any) -> str:
    """A torch function as it is called."""
    return torch.overrides.resolve_name(func) or str(func)


def running() -> str:
    """The torch function whose rule is running."""
    return name_of(_state.func)


def is_slab(x: Any) -> TypeGuard[Slab]:
    """True if `x` is a slab of the kind that rules run for."""
    return isinstance(x, _state.kind)


def either(*given: Any) -> Slab:
    """The first slab among them; there is one."""
    return next(x for x in given if is_slab(x))


class _Opened(NamedTuple):
    kind: type[Slab]
    local: Any
    cut: int
    partition: Partition
    group: RankGroup

    @staticmethod
    def of(x: Slab) -> _Opened:
        local = _Opened.of(x.local) if isinstance(x.local, Slab) else x.local
        return _Opened(type(x), local, x.cut, x.partition, x.group)

    def close(self) -> Slab:
        local = self.local.close() if isinstance(self.local, _Opened) else self.local
        return self.kind(local, self.cut, self.partition, self.group)


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


def _each(args: tuple, kwargs: dict, kind: type, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    def is_one(x: Any) -> bool:
        return isinstance(x, kind)

    return _pytree.tree_map(lambda x: change(x) if is_one(x) else x, (args, kwargs), is_leaf=is_one)


def rule(*names: str) -> Callable[[Callable], Callable]:
    """Register a function as the rule of torch functions: "conv2d" wherever it is found, "F.pad" there alone."""

    def register(function: Callable) -> Callable:
        for name in names:
            for func in torch_functions(name):
                RULES[func] = function
        return function

    return register


def torch_functions(name: str) -> list[Any]:
    """The functions of that name in torch's namespaces."""
    space, _, bare = name.rpartition(".")
    spaces = [_NAMESPACES[space]] if space else list(_NAMESPACES.values())
    found = [getattr(place, bare) for place in spaces if callable(getattr(place, bare, None))]
    if not found:
        raise LookupError(f"torch has no function {name}")
    return found


@contextmanager
def inside_model() -> Iterator[None]:
    """While a converted model runs, a plain tensor is whole; outside, it is a shard."""
    before = _state.inside
    _state.inside, _state.refusal = True, None
    try:
        yield
    except RuntimeError as error:
        # Scripted code turns every error into one of its own, without the text.
        raise (_state.refusal or error) from None
    finally:
        _state.inside, _state.refusal = before, None


def is_inside_model() -> bool:
    """True in the forward of a converted model, and when checkpointing runs parts of it again."""
    return _state.inside or torch._C._current_graph_task_id() != -1


def refuse(call: str, reason: str, remedy: str = "") -> NoReturn:
    """Stop with the module, the line of the model's code and the remedy. Every rank meets the same call."""
    module, place = whereabouts(sys._getframe(1))
    kind = _state.kind
    _state.refusal = DomainParallelError(
        f"{module}: {call} cannot be done on {kind.described}: {reason}.{place}\n{remedy or kind.remedy}"
    )
    raise _state.refusal


def whereabouts(frame: FrameType | None) -> tuple[str, str]:
    """The innermost module of the model that runs in `frame`, by its path, and the line of code it is at."""
    modules: list[nn.Module] = []
    place = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        own = name.startswith(_OWN) or name == "torch"
        if not own and not place:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            place = f"\n  {frame.f_code.co_filename}:{frame.f_lineno}: {line}"
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module not in modules:
            modules.append(module)
        frame = frame.f_back
    if not modules:
        return "outside of any module", place
    names = {module: name for name, module in modules[-1].named_modules()}
    root = type(modules[-1]).__name__
    path = names.get(modules[0]) or root
    return f"{path} ({type(modules[0]).__name__})" if path != root else root, place
