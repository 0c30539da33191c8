"""What holds tensors at the border of a model: opened, so that each is seen, or refused by its type.

torch's pytree opens lists, tuples, dictionaries and what is registered with it. Dataclasses and namespaces are opened
here. Anything else is one piece, and must hold no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.torch_private import register_pytree_node, tree_flatten, tree_map, tree_unflatten

DEPTH = 4
"""How deep objects are searched for tensors."""


class _Opened:
    """An object whose attributes are tensors, or hold some."""

    def __init__(self, original: Any, values: dict[str, Any]) -> None:
        self.original, self.values = original, values

    def close(self) -> Any:
        values = {name: closed(value) for name, value in self.values.items()}
        if isinstance(self.original, SimpleNamespace):
            return SimpleNamespace(**values)
        first = {field.name: values[field.name] for field in dataclasses.fields(self.original) if field.init}
        made = dataclasses.replace(self.original, **first)
        for name in values.keys() - first.keys():
            object.__setattr__(made, name, values[name])
        return made


register_pytree_node(
    _Opened,
    lambda x: ([*x.values.values()], (x.original, [*x.values])),
    lambda values, context: _Opened(context[0], dict(zip(context[1], values, strict=True))),
)


def opened(x: Any, of: str = "a sharded model") -> Any:
    """`x` with everything opened that holds a tensor.

    Raises:
        DomainParallelError: if an object holds one that cannot be opened; `of` says at whose border.
    """
    return tree_map(partial(_open, of), x, is_leaf=lambda one: isinstance(one, Tensor))


def closed(x: Any) -> Any:
    """The inverse of `opened`."""
    return tree_map(lambda one: one.close() if isinstance(one, _Opened) else one, x, is_leaf=_is_closed)


def _is_closed(x: Any) -> bool:
    return isinstance(x, _Opened | Tensor)


def _open(of: str, x: Any) -> Any:
    if isinstance(x, Tensor | bool | int | float | str | bytes | type(None) | type):
        return x
    if isinstance(x, SimpleNamespace):
        return _Opened(x, {name: opened(value, of) for name, value in vars(x).items()})
    if dataclasses.is_dataclass(x):
        return _Opened(x, {field.name: opened(getattr(x, field.name), of) for field in dataclasses.fields(x)})
    if _holds_tensor(x, DEPTH):
        raise DomainParallelError(
            f"{of}: a tensor inside of a {type(x).__module__}.{type(x).__qualname__} comes to its border, where it "
            f"would be taken for whole. Give tensors by themselves or in tuples, lists, dictionaries, "
            f"dataclasses; or register the type with {register_pytree_node.__module__}.register_pytree_node."
        )
    return x


def _holds_tensor(x: Any, depth: int) -> bool:
    if isinstance(x, Tensor):
        return True
    if depth == 0 or isinstance(x, bool | int | float | str | bytes | type | nn.Module):
        return False
    return any(_holds_tensor(value, depth - 1) for value in _contents(x))


def _contents(x: Any) -> Iterable[Any]:
    if isinstance(x, Mapping):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset):
        yield from x
    yield from getattr(x, "__dict__", {}).values()
    for kind in type(x).__mro__:
        slots = getattr(kind, "__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, slot):
                yield getattr(x, slot)


def flattened(x: Any, of: str = "a sharded model") -> tuple[list[Any], Any]:
    """(what is in it, its structure), of whatever holds tensors; `of` as in `opened`."""
    return tree_flatten(opened(x, of), is_leaf=lambda one: isinstance(one, Tensor))


def restored(leaves: list[Any], structure: Any) -> Any:
    """The inverse of `flattened`."""
    return closed(tree_unflatten(leaves, structure))
