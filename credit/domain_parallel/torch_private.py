"""Whatever is used of torch that torch calls private: the list to go through when torch is upgraded.

Modules whose names begin with an underscore, and names that do. `tests/test_project.py` keeps this file, and
`torch_private_recording`, the only such ones.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import (
    register_pytree_node,
    tree_flatten,
    tree_iter,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "NN",
    "BackwardHookFunction",
    "BatchNorm",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "accumulated_hooks",
    "allow_recompiles",
    "before_backward",
    "bound_default_group",
    "compiled",
    "compute_local_shape_and_global_offset",
    "default_store",
    "default_timeout",
    "dispatch_modes",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_norm",
    "gradient_hooks",
    "group_timeout",
    "inside_backward",
    "is_faked",
    "make_wrapper_subclass",
    "no_dispatch_modes",
    "no_torch_function",
    "no_torch_function_here",
    "register_pytree_node",
    "schemas",
    "torch_function_off",
    "torch_function_on",
    "tree_flatten",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "unsafe_view",
]

BatchNorm: Any = nn.modules.batchnorm._BatchNorm
"""What the batch norms of all dimensions are."""

BackwardHookFunction: Any = nn.modules._functions.BackwardHookFunction
"""By which the backward hooks of a module see gradients."""

NN: Any = torch._C._nn
"""Where `torch.nn.functional` has some of its functions from."""

torch_function_off: Any = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses of tensors are tensors."""

torch_function_on: Any = torch._C._EnableTorchFunction
"""A context, within the one above, in which they are not."""

no_torch_function_here: Any = torch._C.DisableTorchFunction
"""A context in which function modes, too, are off."""

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a subclass that only carries a name."""

no_dispatch_modes = _disable_current_modes

dispatch_modes = _get_current_dispatch_mode_stack
"""Those that are on in this thread, the outermost first."""

make_wrapper_subclass: Any = torch.Tensor._make_wrapper_subclass
"""A tensor of any shape that has no storage."""

unsafe_view: Any = torch.ops.aten._unsafe_view
"""A reshape that autograd does not take for a view, so that the result may be changed in place."""

foreach_lerp_, foreach_mul_, foreach_norm = torch._foreach_lerp_, torch._foreach_mul_, torch._foreach_norm


def inside_backward() -> bool:
    """Autograd's engine is running on this thread."""
    return torch._C._current_graph_task_id() != -1


_run_backward: Any = torch.autograd._engine_run_backward


def before_backward(check: Callable[[], None]) -> None:
    """Call `check` before every backward that starts, in whatever words; no other check that was given before."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        check()
        return _run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = checked


def gradient_hooks(x: Tensor) -> dict[int, Any]:
    """What `register_hook` has put onto a tensor: the very dictionary that is called."""
    return x._backward_hooks or {}


def accumulated_hooks(x: Tensor) -> dict[int, Any]:
    """What `register_post_accumulate_grad_hook` has put onto a tensor."""
    return x._post_accumulate_grad_hooks or {}


def is_faked() -> bool:
    """Operators run on fake tensors here."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def schemas(name: str) -> list[Any]:
    """The overloads of an operator of aten."""
    return torch._C._jit_get_schemas_for_operator(f"aten::{name}")


def compiled(module: nn.Module) -> nn.Module | None:
    """What `torch.compile(module)` was made of, if this is such."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else None


def allow_recompiles(number: int) -> None:
    """Shapes of one function that are compiled, before it goes on in eager mode."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)


def default_store() -> dist.Store:
    """That of the default process group."""
    return dist.distributed_c10d._get_default_store()


def default_timeout() -> timedelta:
    """That of the default process group."""
    return group_timeout(dist.distributed_c10d._get_default_group(), "cpu")


def group_timeout(group: dist.ProcessGroup, device: str) -> timedelta:
    """That of a process group, for tensors on devices of this type."""
    return group._get_backend(torch.device(device)).options._timeout


def bound_default_group(timeout: timedelta) -> None:
    """Give the default process group another timeout."""
    dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


def compute_local_shape_and_global_offset(*given: Any) -> Any:
    """Of a DTensor's shard. DTensors take a second to import, and the core has none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(*given)
