"""Functions of corresponding entries: local, once everything is cut alike."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.calls import POINTWISE
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import cut_along, own, whole
from credit.domain_parallel.slab import (
    Declined,
    Slab,
    getter,
    is_slab,
    register_rule,
    rule,
    torch_functions,
)

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


def align(x: Any, like: Slab) -> Any:
    """This rank's part of `x` where it broadcasts against `like`; what is no tensor, as it is."""
    if not isinstance(x, Tensor):
        return x
    axis = x.ndim + like.cut - like.ndim
    if axis < 0 or x.shape[axis] == 1:
        return whole(x)
    if x.shape[axis] != like.shape[like.cut]:
        raise Declined
    return cut_along(x, axis, like)


def lead(operands: Iterable[Any]) -> Slab:
    """The slab after which the others are cut: of the most axes, plainly cut rather than merged."""
    slabs = [x for x in operands if is_slab(x)]
    if len(slabs) == 1:
        return slabs[0]
    if not slabs:
        raise Declined
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
    """The rule of a function of corresponding entries: it takes any arguments, and hands all of them on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        like = lead((*args, *kwargs.values()) if kwargs else args)
        out = func(*[align(x, like) for x in args], **{name: align(x, like) for name, x in kwargs.items()})
        first = args[0] if args else like
        return first if is_slab(first) and out is first._local else result(out, like)

    return call


def in_place(func: Any) -> Any:
    """The rule of a function that changes its first argument to one of corresponding entries."""

    def call(target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_slab(target):
            return func(target, *[whole(x) for x in args], **{name: whole(x) for name, x in kwargs.items()})
        given = [align(x, target) for x in args], {name: align(x, target) for name, x in kwargs.items()}
        if any(isinstance(x, Tensor) and x.ndim > target.ndim for x in (*args, *kwargs.values())):
            raise Declined
        func(target.local, *given[0], **given[1])
        return target

    return call


def where(*args: Any, **kwargs: Any) -> Any:
    if len(args) + len(kwargs) == 1:
        raise Declined  # the number of entries each rank would hold is not known
    return pointwise(torch.where)(*args, **kwargs)


def _found(names: Iterable[str]) -> list[Any]:
    """The functions of these names, those that torch has, each once."""
    found: dict[Any, None] = {}
    for name in names:
        with suppress(LookupError):
            found |= dict.fromkeys(torch_functions(name))
    return [*found]


_BARE = [name for name in (*UNARY.split(), *BINARY.split()) if not name.startswith(("__", "F.", "nn."))]
_RULES = {func: pointwise(func) for func in _found((*UNARY.split(), *BINARY.split()))} | {torch.where: where}
_RULES |= {func: in_place(func) for func in _found((*(f"{name}_" for name in _BARE), *IN_PLACE.split()))}
_RULES |= {func: pointwise(func) for func in map(getter, ("real", "imag", "data"))}
for _func, _answer in _RULES.items():
    register_rule(_func, _answer)
    POINTWISE.add(_func)


def _as_other(func: Any) -> Any:
    """The other tensors tell a type, no values."""

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        others = [other._local if is_slab(other) else other for other in args]
        kwargs = {name: other._local if is_slab(other) else other for name, other in kwargs.items()}
        if not is_slab(input):
            return func(input, *others, **kwargs)
        out = func(input.local, *others, **kwargs)
        return input if out is input._local else result(out, input)

    return call


for _name in ("to", "type_as", "zeros_like", "ones_like", "full_like", "empty_like"):
    for _func in torch_functions(_name):
        register_rule(_func, _as_other(_func))


def _new(func: Any) -> Any:
    return lambda input, *args, **kwargs: func(input._local, *args, **kwargs)


for _name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"):
    register_rule(getattr(torch.Tensor, _name), _new(getattr(torch.Tensor, _name)))


@rule("prelu")
def prelu(input: Slab, weight: Tensor) -> Slab:
    """One slope for all, or one a channel (axis 1)."""
    if is_slab(weight) or not is_slab(input):
        raise Declined
    mine = own(weight, 0, input) if input.cut == 1 and weight.numel() > 1 else weight
    return result(F.prelu(input.local, mine), input)
