"""What a slab answers about itself: the shape of the whole, the type and device of its rows."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from credit.domain_parallel.slab import ASKS, Slab, getter, is_slab, refuse, register_rule, torch_functions
from credit.domain_parallel.torch_private import torch_function_off


def asked(*names: str) -> Callable[[Callable], Callable]:
    """Register a function as the answer to what is asked of a slab."""

    def register(function: Callable) -> Callable:
        for name in names:
            bare = name.removeprefix("Tensor.")
            found = [getter(bare)] if bare == "grad" else torch_functions(name)
            for func in found:
                _answer(func, function)
        return function

    return register


def _answer(func: Any, function: Callable) -> None:
    register_rule(func, function)
    ASKS.add(func)


# Read off the slab itself, which has the shape of the whole.
_ATTRIBUTES: tuple[str, ...] = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_meta",
)
_ATTRIBUTES += ("is_sparse", "is_quantized", "is_mkldnn", "is_nested", "is_mps", "is_xpu", "itemsize", "nbytes")
_METHODS: tuple[str, ...] = (
    "size",
    "dim",
    "numel",
    "nelement",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "element_size",
)
_METHODS += ("get_device", "__len__", "is_inference", "is_signed", "__hash__")

for _name in _ATTRIBUTES:
    _answer(getter(_name), getter(_name))
for _name in _METHODS:
    for _func in torch_functions(_name):
        _answer(_func, _func)

# Asked of the rows.
for _getter in map(getter, ("grad_fn", "is_leaf", "_base", "requires_grad", "grad_dtype")):
    _answer(_getter, lambda x, getter=_getter: getter(x.local))
for _name in ("is_pinned", "is_shared", "requires_grad_", "retain_grad"):
    _func = getattr(torch.Tensor, _name)
    _answer(_func, lambda x, *args, func=_func: _of_rows(x, func(x.local, *args)))


def _of_rows(x: Slab, answer: Any) -> Any:
    if not isinstance(answer, torch.Tensor):
        return answer
    with torch_function_off():
        torch.Tensor.requires_grad_(x, answer.requires_grad)
    return x


@asked("Tensor.stride")
def stride(input: Slab, dim: int | None = None) -> Any:
    strides = input.strides or _contiguous(tuple(input.shape))
    return strides if dim is None else strides[dim]


@asked("Tensor.storage_offset")
def storage_offset(input: Slab) -> int:
    refuse("storage_offset", "the rows are in the memory of several ranks")


@asked("Tensor.is_contiguous")
def is_contiguous(input: Slab, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
    empty = torch.empty_strided(input.shape, stride(input), device="meta")
    return empty.is_contiguous(memory_format=memory_format)


@asked("is_conj", "is_neg")
def is_conj(input: Slab) -> bool:
    return False


@asked("Tensor.grad")
def grad(input: Slab) -> Any:
    found = input.local.grad
    return None if found is None else input.like(found)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(n or 1 for n in shape[i + 1 :]) for i in range(len(shape)))


def type_(input: Slab, dtype: Any = None, non_blocking: bool = False) -> Any:
    kind = input.local.type() if dtype is None else input.local.type(dtype, non_blocking)
    if isinstance(kind, str) or kind is input._local:
        return kind if isinstance(kind, str) else input
    return input.like(kind)


register_rule(torch.Tensor.type, type_)  # of which torch has no declaration


@asked("Tensor.register_hook")
def register_hook(self: Slab, hook: Any) -> Any:
    """The hook gets and gives the gradient as a slab, as it would get that of the whole."""

    def on_rows(grad: torch.Tensor) -> torch.Tensor | None:
        changed = hook(self.like(grad))
        return changed.local if is_slab(changed) else changed

    return self.local.register_hook(on_rows)
