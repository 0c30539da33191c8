"""Functions that torch wrote in Python: what their bodies call is met one by one."""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F

from credit.domain_parallel.slab import COMPOSITE


def run_body(func: Any) -> types.FunctionType:
    """`func`, a torch function written in Python, without its first lines that hand over to slabs.

    What its body calls is then met one by one.
    """
    unguarded = dict(func.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        unguarded[name] = lambda *args: False
    body = types.FunctionType(func.__code__, unguarded, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


for _func in (F.multi_head_attention_forward, F.normalize, F.gumbel_softmax):
    COMPOSITE[_func] = run_body(_func)
