"""More of what torch calls private, for recordings alone: importing it takes half a second. See `torch_private`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._higher_order_ops.effects import EffectType
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _BoxedCodeGen
from torch.nn.utils import parametrize
from torch.utils._pytree import TreeSpec

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TreeSpec",
    "below_autograd",
    "boxed",
    "inductor",
    "keep_in_order",
    "modes_see_calls",
    "takes_forward_derivatives",
]

below_autograd: Any = torch._C._AutoDispatchBelowADInplaceOrView
"""A context in which operators record neither gradients nor views, whatever they are given."""


def boxed(graph: fx.Graph, module: nn.Module) -> fx.GraphModule:
    """A graph whose forward takes one list, and empties it as it goes."""
    graph.set_codegen(_BoxedCodeGen())
    return fx.GraphModule(module, graph)


def inductor(module: fx.GraphModule, given: list[Any]) -> Any:
    """Compiled for such inputs, with the random numbers of eager code."""
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), torch._inductor.config.patch(fallback_random=True):
        return compile_fx(module, given)


def keep_in_order(operator: Any) -> None:
    """Compilers are not to change the order of this operator's calls."""
    torch.library._register_effectful_op(operator, EffectType.ORDERED)


def modes_see_calls() -> bool:
    """A torch function mode or a functorch transform is active."""
    return bool(torch._C._len_torch_function_stack()) or torch._C._functorch.peek_interpreter_stack() is not None


def takes_forward_derivatives() -> bool:
    """Forward-mode derivatives are taken, or parametrizations are cached."""
    return torch.autograd.forward_ad._current_level >= 0 or bool(parametrize._cache_enabled)
