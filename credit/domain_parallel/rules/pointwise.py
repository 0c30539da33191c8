"""Functions of corresponding entries: local, once everything is cut alike."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import cut_along, own, whole
from credit.domain_parallel.slab import ASSIGN, RULES, Slab, getter, is_slab, refuse, rule, torch_functions

UNARY = """
abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bitwise_not ceil
clone contiguous conj conj_physical resolve_conj resolve_neg cos cosh deg2rad detach digamma erf erfc erfinv exp exp2
expm1 fix floor frac imag real isfinite isinf isnan isneginf isposinf isreal lgamma log log10 log1p log2 logical_not
logit nan_to_num neg negative polygamma positive rad2deg reciprocal relu round rsqrt sgn sigmoid sign signbit sin sinc
sinh sqrt square tan tanh trunc i0 entr erfcx expit xlogy
celu elu gelu hardshrink F.hardsigmoid F.hardswish F.hardtanh F.leaky_relu F.logsigmoid F.mish F.relu6 selu
F.silu F.softplus F.softshrink F.softsign F.tanhshrink F.threshold leaky_relu hardtanh hardsigmoid hardswish
nn.gelu nn.elu silu mish relu6 nn.log_sigmoid nn.softplus
float double half bfloat16 int long short bool char byte cpu cuda clamp clip clamp_min clamp_max
"""
BINARY = """
add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power rsub atan2 arctan2
maximum minimum fmax fmin hypot copysign nextafter ldexp logaddexp logaddexp2 xlog1py heaviside
eq ne lt le gt ge greater less greater_equal less_equal not_equal isclose logical_and logical_or logical_xor
bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift lerp where masked_fill addcmul
addcdiv complex polar
__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__
__rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __and__ __rand__ __or__ __ror__
__xor__ __rxor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __lshift__ __rshift__
"""
IN_PLACE = """
__iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
relu_ F.elu_ F.leaky_relu_ F.hardtanh_ F.threshold_ F.celu_ F.selu_ zero_ fill_ copy_
"""


def _operands(args: tuple, kwargs: dict) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def align(x: Any, like: Slab) -> Any:
    """This rank's part of `x` where it broadcasts against `like`; what is no tensor, as it is."""
    if not isinstance(x, Tensor):
        return x
    from_end = like.cut - like.ndim
    axis = x.ndim + from_end
    runs_along = axis >= 0 and x.shape[axis] == like.shape[like.cut]
    return cut_along(x, axis, like) if runs_along else whole(x)


def lead(operands: list[Tensor]) -> Slab:
    """The slab after which the others are cut: of the most axes, plainly cut rather than merged."""
    slabs = [x for x in operands if is_slab(x)]
    return min(slabs, key=lambda x: (-x.ndim, not x.partition.is_plain))


def result(out: Any, like: Slab, cut_from_end: int | None = None, partition: Partition | None = None) -> Any:
    """Wrap what a local call returned; `cut_from_end` is where the cut is now (-1 for the last axis)."""
    if isinstance(out, tuple | list):
        return type(out)(result(one, like, cut_from_end, partition) for one in out)
    if not isinstance(out, Tensor):
        return out
    from_end = like.cut - like.ndim if cut_from_end is None else cut_from_end
    return like.like(out, out.ndim + from_end, partition)


def pointwise(func: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:
            refuse(f"{func.__name__} with out=", "the rows of the result are on several ranks")
        like = lead(_operands(args, kwargs))
        out = func(*[align(x, like) for x in args], **{name: align(x, like) for name, x in kwargs.items()})
        if is_slab(args[0]) and out is args[0]._local and func.__name__ not in ("contiguous", "__pos__"):
            writable(args[0], func.__name__)  # inplace=True
            return updated(args[0])
        return result(out, like)

    return call


def in_place(func: Any) -> Any:
    def call(target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_slab(target):
            return func(target, *[whole(x) for x in args], **{name: whole(x) for name, x in kwargs.items()})
        writable(target, func.__name__)
        func(target.local, *[align(x, target) for x in args], **{name: align(x, target) for name, x in kwargs.items()})
        return updated(target)

    return call


def writable(target: Slab, call: str) -> None:
    """Refuse to write to a slice whose rows are copies: torch would change the tensor it was cut from, too."""
    if target._source is not None:
        refuse(
            f"{call} on a slice",
            "its rows are copies, and the tensor it was cut from would not change",
            ASSIGN,
        )
    # Its place in the list, the loop and the argument make three references; a fourth is the model's.
    if any(sys.getrefcount(copy) > 3 for copy, _ in target.copies):
        refuse(f"{call} on a tensor of which a slice is in use", "the slice is a copy, and would not change", ASSIGN)


def updated(target: Slab) -> Slab:
    """`target` after its rows were changed in place, when they may need gradients for the first time."""
    if target._local.requires_grad and not target.requires_grad:
        target.requires_grad_(True)
    return target


def _exists(name: str) -> bool:
    try:
        return bool(torch_functions(name))
    except LookupError:
        return False


for _name in (*UNARY.split(), *BINARY.split()):
    if _exists(_name):
        for _func in torch_functions(_name):
            RULES[_func] = pointwise(_func)
    if _exists(f"{_name}_") and not _name.startswith(("__", "F.", "nn.")):
        for _func in torch_functions(f"{_name}_"):
            RULES[_func] = in_place(_func)
for _name in IN_PLACE.split():
    for _func in torch_functions(_name):
        RULES[_func] = in_place(_func)
for _getter in map(getter, ("real", "imag", "data")):
    RULES[_getter] = pointwise(_getter)


def _like_first(func: Any) -> Any:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The other tensors tell a type, no values."""
        others = [other.local if is_slab(other) else other for other in args]
        return result(func(x.local, *others, **kwargs), x) if is_slab(x) else func(x, *others, **kwargs)

    return call


def where(*args: Any, **kwargs: Any) -> Any:
    if len(args) + len(kwargs) == 1:
        refuse("torch.where of a condition alone", "the number of entries each rank would hold is not known")
    return pointwise(torch.where)(*args, **kwargs)


RULES[torch.where] = where


for _name in ("to", "type_as", "zeros_like", "ones_like", "full_like", "empty_like"):
    for _func in torch_functions(_name):
        RULES[_func] = _like_first(_func)


def _new(func: Any) -> Any:
    return lambda x, *args, **kwargs: func(x.local, *args, **kwargs)


for _name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"):
    RULES[getattr(torch.Tensor, _name)] = _new(getattr(torch.Tensor, _name))


@rule("prelu")
def prelu(x: Slab, weight: Tensor) -> Slab:
    """One slope for all, or one a channel (axis 1)."""
    mine = own(weight, 0, x) if x.cut == 1 and weight.numel() > 1 else weight
    return result(F.prelu(x.local, mine), x)
