"""Torch's own declarations, and calls bound to them.

A torch function is called in many spellings: by position, by keyword, with the names of NumPy, with integers in place
of a list. `bind` gives the arguments of a call by the names that torch declares (the overload's schema, or the Python
signature of a function written in Python), so that a rule sees one spelling. The first argument of a method is
`input`, as the functions call it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.torch_private import schemas

ALIASES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "x1": "input",
    "x": "input",
    "a": "input",
    "x2": "other",
    "self": "input",
}
"""Other names that torch takes (torch/csrc/utils/python_arg_parser.cpp), where the declared one is among the names."""

MISSING = inspect.Parameter.empty

_SLOTS = {
    "__getitem__": ("input", "index"),
    "__setitem__": ("input", "index", "value"),
    "__matmul__": ("input", "other"),
}
"""Methods of which torch declares nothing."""


@dataclass(frozen=True)
class Argument:
    """One declared argument.

    Attributes:
        kind: its type as schemas write it, "int[1]"; "" where anything goes.
        default: MISSING if it must be given.
    """

    name: str
    kind: str = ""
    default: Any = MISSING
    by_keyword: bool = False

    def accepts(self, value: Any) -> bool:
        if self.kind.endswith("?") or self.kind == "":
            return value is None or self.kind == "" or _accepts(self.kind[:-1], value)
        return _accepts(self.kind, value)


@dataclass(frozen=True)
class Declaration:
    """One way to call a function.

    Attributes:
        gathers: the name of the argument that takes all further positions (`*tensors`).
    """

    arguments: tuple[Argument, ...]
    gathers: str | None = None
    positional: tuple[Argument, ...] = field(init=False)
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positional", tuple(a for a in self.arguments if not a.by_keyword))
        object.__setattr__(self, "names", frozenset(a.name for a in self.arguments))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Source] | None:
        """Where the value of each argument is found in a call; None if they do not fit."""
        places = self._spread(args)
        if len(places) > len(self.positional) and self.gathers is None:
            return None
        names = (a.name for a in self.positional) if self.gathers is None else (self.gathers,)
        bound: dict[str, Source] = dict(zip(names, places, strict=False))
        for given in kwargs:
            name = given if given in self.names else ALIASES.get(given, given)
            if name in bound or name not in self.names:
                return None
            bound[name] = given
        for argument in self.arguments:
            if argument.name not in bound:
                if argument.default is MISSING:
                    return None
            elif not argument.accepts(_value(bound[argument.name], args, kwargs)):
                return None
        return bound

    def _spread(self, args: tuple[Any, ...]) -> Sequence[Source]:
        """What the positions of a call give: a position each, or several to the list that is declared last."""
        if self.gathers is not None:
            return [slice(None)]
        places = self.positional
        last = len(places) - 1
        spread = len(args) > 1 and 0 <= last <= 1 and places[last].kind.startswith(("int[", "SymInt["))
        if spread and len(args) > last and all(type(a) is int for a in args[last:]):
            return [*range(last), slice(last, None)]
        return range(len(args))


Source = int | slice | str
"""Of a value in a call: its position, the positions that make up one list, its keyword."""


def _value(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs[source] if isinstance(source, str) else args[source]


def _accepts(kind: str, value: Any) -> bool:
    if kind.endswith("]"):
        kind, _, length = kind.partition("[")
        if isinstance(value, list | tuple):
            return all(_accepts(kind, one) for one in value)
        return length != "]" and _accepts(kind, value)
    if kind.startswith("Tensor"):
        return isinstance(value, Tensor)
    expected = _KINDS.get(kind)
    if expected is None:
        return True
    return isinstance(value, expected) and (kind in ("bool", "Scalar") or not isinstance(value, bool))


_KINDS: dict[str, Any] = {
    "int": int,
    "SymInt": int,
    "float": (int, float),
    "Scalar": Number,
    "bool": bool,
    "str": str,
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": (str, torch.device),
    "Generator": torch.Generator,
}


@cache
def declarations(func: Any) -> tuple[Declaration, ...]:
    """All ways to call `func`, the ones that write into `out` left out; empty if torch does not tell."""
    if inspect.isfunction(func):
        return (_of_signature(_signature(func)),)
    if type(func).__name__ == "method-wrapper":  # the getter of an attribute
        return (Declaration((Argument("input"),)),)
    name = getattr(func, "__name__", "")
    if name in _SLOTS:
        return (Declaration(tuple(map(Argument, _SLOTS[name]))),)
    found = [_of_schema(schema) for schema in schemas(name)]
    return tuple(declaration for declaration in found if declaration is not None)


@cache
def _testing_overrides() -> dict[Any, Callable[..., Any]]:
    return torch.overrides.get_testing_overrides()


def _signature(func: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(func)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # Functions that hand over to one of two others, by a flag: max_pool2d, with indices or without.
        return inspect.signature(_testing_overrides()[func])
    return signature


def _of_signature(signature: inspect.Signature) -> Declaration:
    arguments, gathers = [], None
    for i, (name, parameter) in enumerate(signature.parameters.items()):
        name = "input" if i == 0 and name == "self" else name
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            gathers = name
        arguments.append(Argument(name, "", parameter.default, parameter.kind is inspect.Parameter.KEYWORD_ONLY))
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[-1] = Argument(name, "", (), True)
    return Declaration(tuple(arguments), gathers)


def _of_schema(schema: Any) -> Declaration | None:
    if any(argument.is_out for argument in schema.arguments):
        return None
    text = str(schema).partition("(")[2]
    if not text.startswith("Tensor"):  # of lists and strings: torchscript's own
        return None
    return Declaration(tuple(_of_argument(argument) for argument in schema.arguments))


def _of_argument(argument: Any) -> Argument:
    name = "input" if argument.name == "self" else argument.name
    default = argument.default_value if argument.has_default_value() else MISSING
    return Argument(name, _kind(argument), default, argument.kwarg_only)


def _kind(argument: Any) -> str:
    kind, optional = str(argument.real_type), False
    if kind.startswith("Optional["):
        kind, optional = kind[len("Optional[") : -1], True
    if kind.startswith("List["):
        kind = kind[len("List[") : -1]
        kind = f"{kind}[{argument.N or ''}]"
    kind = "Scalar" if kind == "number" else kind
    return f"{kind}?" if optional else kind


_bindings: dict[Any, list[tuple[str, Source]] | None] = {}


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by the names torch declares, those that were given; None if no declaration fits."""
    key = (func, *map(_kind_of, args), *((name, _kind_of(x)) for name, x in kwargs.items()))
    try:
        sources = _bindings[key]
    except KeyError:
        found = (declaration.bind(args, kwargs) for declaration in declarations(func))
        first = next((one for one in found if one is not None), None)
        sources = _bindings[key] = None if first is None else [*first.items()]
    if sources is None:
        return None
    return {name: kwargs[at] if type(at) is str else args[at] for name, at in sources}  # type: ignore[index]


def _kind_of(x: Any) -> Any:
    """All that declarations ask of a value: its type, and those of what it holds."""
    return (type(x), frozenset(map(_kind_of, x))) if isinstance(x, list | tuple) else type(x)
