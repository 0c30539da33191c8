"""What operators that were written down do to memory, and besides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from credit.domain_parallel.wire import CALLS


def has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False  # an entry of a tuple
    return schema.is_mutable or not schema.returns or node.target in CALLS or draws(node)


def draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def changed(node: fx.Node) -> list[fx.Node]:
    """What an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name) if argument.kwarg_only or i >= len(node.args) else node.args[i]
            found.extend(x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, fx.Node))
    return found


def storage(node: fx.Node) -> Any:
    """Which memory it is in; what is no one tensor is in none that others are in."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else node


def sharing(nodes: list[fx.Node], saved: list[fx.Node]) -> tuple[int, ...]:
    places = {storage(x) for x in saved}
    return tuple(i for i, node in enumerate(nodes) if storage(node) in places)
