"""Hooks of a model, which are given what they would be given on one device.

Those that the outermost module has when it is converted run inside, on whole fields. Of the gradient of a whole tensor
(a weight, a mean over the globe) each rank has a part, and the parts add up: a hook on it is given their sum. What a
hook is to do with a gradient after it has reached its parameter cannot wait for that, and is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.slab import ASKS, RULES, group_inside, is_slab, refuse
from credit.domain_parallel.torch_private import accumulated_hooks, before_backward, gradient_hooks
from credit.domain_parallel.whole_view import as_whole

MODULE_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Where a module keeps its hooks."""

_seen: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many hooks there had been when the parameters of a model were last looked at."""

_register_hook = Tensor.register_hook
"""As torch has it."""


def take_inside(root: nn.Module) -> None:
    """From now on the hooks that `root` has run inside; those it gets later see shards, as who calls it does."""
    held = vars(root)
    held["_hooks_inside"] = {name: held[name] for name in MODULE_HOOKS}
    held.update({name: OrderedDict() for name in MODULE_HOOKS})


def has_hooks_inside(root: nn.Module) -> bool:
    return any(vars(root)["_hooks_inside"].values())


@contextmanager
def hooks_inside(root: nn.Module) -> Iterator[None]:
    """While it lasts, `root` has the hooks that run inside, and no others."""
    held = vars(root)
    outside = {name: held[name] for name in MODULE_HOOKS}
    held.update(held["_hooks_inside"])
    try:
        yield
    finally:
        held.update(outside)


def register_hook(self: Tensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """`Tensor.register_hook`, of whole tensors inside of a converted model too."""
    self = as_whole(self)
    group = group_inside()
    return _register_hook(self, hook if group is None or is_slab(self) else _of_sum(hook, group))


def _knows_of_ranks(hook: Any) -> bool:
    """It is one of this package's, or of torch's."""
    return getattr(hook, "__module__", "").startswith(("credit.domain_parallel.", "credit.parallel.", "torch."))


def _of_sum(hook: Callable[[Tensor], Tensor | None], group: RankGroup) -> Callable[[Tensor], Tensor | None]:
    """`hook`, given the sum of the ranks' gradients; what it makes of that counts once."""
    if _knows_of_ranks(hook):
        return hook

    @wraps(hook)
    def on_part(grad: Tensor) -> Tensor | None:
        changed = hook(group.all_reduce(grad))
        return changed if changed is None or group.rank == 0 else torch.zeros_like(changed)

    on_part.__module__ = __name__
    return on_part


def answer_parameter_hooks(root: nn.Module, group: RankGroup) -> None:
    """Give the hooks that parameters of `root` have by now the sums of gradients. To be called before a forward.

    Raises:
        DomainParallelError: if a parameter has a hook that is called once its gradient is accumulated.
    """
    if _seen.get(root) == RemovableHandle.next_id:  # no hook was made since
        return
    for name, parameter in root.named_parameters():
        hooks = gradient_hooks(parameter)
        for key, hook in hooks.items():
            hooks[key] = _of_sum(hook, group)
        for hook in accumulated_hooks(parameter).values():
            if not _knows_of_ranks(hook):
                raise DomainParallelError(
                    f"{name}: a hook is called after its gradient is accumulated, and would take this rank's part of "
                    f"the gradient for the whole. Do what it does after the backward; or give register_hook a "
                    f"function of the gradient."
                )
    _seen[root] = RemovableHandle.next_id


def refuse_parameter_hooks(root: nn.Module) -> None:
    """Where the gradient of each slice would be given to them, and then the whole one.

    Raises:
        DomainParallelError: if a parameter has a hook.
    """
    for name, parameter in root.named_parameters():
        if not all(map(_knows_of_ranks, gradient_hooks(parameter).values())):
            raise DomainParallelError(
                f"{name}: its hook would be given the gradient of each slice. Do what it does after the backward."
            )


def refuse_inner_backward() -> None:
    """Before any backward: one inside of a forward would find this rank's part of a gradient.

    Raises:
        DomainParallelError: if a converted model is running.
    """
    if group_inside() is not None:
        refuse("a backward inside of a forward", "each rank finds a part of the gradient", "Take it after the forward.")


def answer_hooks() -> None:
    """From now on hooks may be registered on whole tensors inside of a model. Elsewhere they do what they did."""
    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    # What torch hands over, to modes and to slabs, is what it finds in Tensor.
    RULES[register_hook] = RULES[_register_hook]
    ASKS.add(register_hook)
    before_backward(refuse_inner_backward)
