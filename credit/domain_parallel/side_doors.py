"""Ways out of a converted model and into its parts that do not lead through its border. They are shut.

What a forward returns leaves as this rank's rows, and its cotangent counts once. What it keeps on a module instead
would be used outside as it is: a loss by every rank, so that its gradient counts as often as there are ranks. A part
that is called by itself would take a shard for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.outcome import tensors_in
from credit.domain_parallel.reshard import whole
from credit.domain_parallel.slab import Slab, class_name, is_inside_model
from credit.domain_parallel.whole_view import WholeView, as_whole

_OURS = ("credit.domain_parallel.", "credit.parallel.")
_HIDDEN = ("_parameters", "_buffers", "_modules")


def make_buffers_whole(root: nn.Module) -> None:
    """To be called after a forward of `root`: buffers that it has set to fields become whole, as they are saved.

    Raises:
        DomainParallelError: if one has a gradient.
    """
    for module in root.modules():
        buffers = vars(module)["_buffers"]
        for name, buffer in buffers.items():
            if type(buffer) in (Slab, WholeView):
                if buffer.requires_grad:
                    _refuse(root, module, name)
                buffers[name] = as_whole(whole(buffer)).clone()


def make_attributes_whole(root: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> None:
    """To be called on all ranks after a forward of `root`: fields that it keeps as attributes become whole.

    Args:
        before: the attributes before the forward, by path and name.

    Raises:
        DomainParallelError: if one that is another now has a gradient, or is in a list or the like.
    """
    for path, module in root.named_modules():
        for name, value in [*vars(module).items()]:
            if name in _HIDDEN:
                continue
            if isinstance(value, list | tuple | dict) and any(isinstance(x, Slab) for x in tensors_in(value)):
                raise DomainParallelError(
                    f"{path or class_name(root)}.{name}: the forward kept a field there, in a {type(value).__name__}, "
                    f"which is lost on slices. Keep it as an attribute or a buffer of its own, or return it."
                )
            if not isinstance(value, Tensor) or value is before.get(path, {}).get(name):
                continue
            if value.requires_grad:
                _refuse(root, module, name)
            setattr(module, name, as_whole(whole(value)).clone() if isinstance(value, Slab | WholeView) else value)


def refuse_side_doors(root: nn.Module) -> None:
    """To be called after a forward of `root`.

    Raises:
        DomainParallelError: if a module keeps a tensor with a gradient that has come from a field. (A `Slab` itself is
            refused when it is used.)
    """
    for module in root.modules():
        for name, value in vars(module).items():
            held = isinstance(value, Tensor | list | tuple | dict) and name not in _HIDDEN
            if held and any(map(_is_of_fields, tensors_in(value))):
                _refuse(root, module, name)


def _refuse(root: nn.Module, module: nn.Module, name: str) -> NoReturn:
    path = next(path for path, one in root.named_modules() if one is module) or class_name(root)
    raise DomainParallelError(
        f"{path}.{name}: the forward kept a tensor with a gradient there, which every rank would add to "
        f"its loss. Return it from the model's forward, or detach it."
    )


def _is_of_fields(x: Tensor) -> bool:
    """True if `x` is whole, and a function of this package is in the graph behind it."""
    if isinstance(x, Slab) or not x.requires_grad:
        return False
    seen, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None and forward.__module__.startswith(_OURS):
            return True
        todo.extend(before for before, _ in node.next_functions)
    return False


def only_inside(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of the parts of a converted model.

    Raises:
        DomainParallelError: if the part is called by itself.
    """
    if not is_inside_model():
        raise DomainParallelError(
            f"{type(module).__name__} is a part of a converted model and was called by itself: it would take this "
            f"rank's rows for a whole field. Call the model; or give the part a model of its own and convert that."
        )
