"""What a slab answers about itself: the shape of the whole, the type and device of its rows."""

from __future__ import annotations

from typing import Any

import torch

from credit.domain_parallel.slab import RULES, Slab, getter, is_slab, refuse, rule, torch_functions

# Read off the slab itself, which has the shape of the whole.
_ATTRIBUTES: tuple[str, ...] = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "requires_grad",
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
_METHODS += ("get_device", "__len__", "is_inference", "is_signed", "stride", "storage_offset")

for _name in _ATTRIBUTES:
    _getter = getter(_name)
    RULES[_getter] = _getter
for _name in _METHODS:
    for _func in torch_functions(_name):
        RULES[_func] = _func

# Asked of the rows.
for _name in ("grad_fn", "is_leaf", "_base"):
    _getter = getter(_name)
    RULES[_getter] = lambda x, getter=_getter: getter(x.local)


@rule("is_contiguous")
def is_contiguous(x: Slab, *args: Any, **kwargs: Any) -> bool:
    return x.local.is_contiguous(*args, **kwargs)


@rule("Tensor.type")
def type_(x: Slab, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    kind = x.local.type() if dtype is None else x.local.type(dtype, *args, **kwargs)
    return kind if isinstance(kind, str) else x.like(kind)


@rule("is_conj", "is_neg")
def is_conj(x: Slab) -> bool:
    return False


@rule("register_hook")
def register_hook(x: Slab, hook: Any) -> Any:
    """The hook gets and gives the gradient as a slab, as it would get that of the whole."""

    def on_rows(grad: torch.Tensor) -> torch.Tensor | None:
        changed = hook(x.like(grad))
        return changed.local if is_slab(changed) else changed

    return x.local.register_hook(on_rows)


@rule("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "__array__", "__contains__")
def to_python(x: Slab, *args: Any, **kwargs: Any) -> Any:
    refuse("turning a field into Python or numpy values", "each rank has its own rows only")
