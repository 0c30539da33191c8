"""Ways out of a converted model and into its parts that do not lead through its border. They are shut.

What a forward returns leaves as this rank's rows, and its cotangent counts once. What it keeps on a module instead
would be used outside as it is: a loss by every rank, so that its gradient counts as often as there are ranks. A part
that is called by itself would take a shard for the whole.
"""

from __future__ import annotations

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
