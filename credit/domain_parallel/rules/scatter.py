"""Reading and writing entries by their numbers: gather, scatter, index_add, embedding, as graph networks and regridding
use them.

Along the axis that is cut the tensors are transposed over the ranks (cut along another axis, on which all are alike),
the function is local and adds up in the order of one device, and the result is transposed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.binding import bind
from credit.domain_parallel.reshard import AllSum, cut_along, own, reshard, whole
from credit.domain_parallel.rules.axes import axis_of, back
from credit.domain_parallel.rules.elementwise import lead
from credit.domain_parallel.slab import Declined, Slab, is_slab, register_rule, rule, torch_functions
from credit.domain_parallel.storage import assign, windows_overlap


def beside(
    function: Callable[..., Any], operands: Sequence[Tensor], axes: Sequence[int], broadcast: bool = False
) -> Any:
    """function(*operands), which runs along `axes` and treats all others alike, with one of those others cut.

    Args:
        operands: of as many axes, as long as one another but along `axes`; or of length 1 with `broadcast`.
    """
    like = lead(operands)
    if any(x.ndim != like.ndim for x in operands):
        raise Declined
    alike = [axis for axis in range(like.ndim) if axis not in axes and _is_alike(operands, axis, broadcast)]
    alike = [axis for axis in alike if like.shape[axis] >= like.group.size]
    if not alike:
        raise Declined
    cut = like.cut if like.cut in alike else alike[0]
    there = reshard(like, cut)
    found = function(*[whole(x) if x.shape[cut] < like.shape[cut] else cut_along(x, cut, there) for x in operands])
    return back(found, there, like.cut)


def _is_alike(operands: Sequence[Tensor], axis: int, broadcast: bool) -> bool:
    lengths = {x.shape[axis] for x in operands}
    return len(lengths) == 1 or (broadcast and len(lengths) == 2 and 1 in lengths)


def decline_out_of_range(index: Tensor, length: int, like: Slab, allowed: int | None = None) -> None:
    """An entry that is none of 0 to length - 1 would stop the ranks alone that have it; gathered, it stops all."""
    mine = index.local if is_slab(index) else index
    if mine.device.type != "cpu":
        return
    beyond = (mine < 0) | (mine >= length)
    out = bool((beyond if allowed is None else beyond & (mine != allowed)).any())
    if is_slab(index):
        out = bool(like.group.all_reduce(torch.tensor(float(out)), "max"))
    if out:
        raise Declined


@rule("gather")
def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if input.ndim == 0 or sparse_grad:
        raise Declined
    axis = axis_of(input, dim)
    decline_out_of_range(index, input.shape[axis], lead((input, index)))
    return beside(lambda x, i: torch.gather(x, axis, i), (input, index), (axis,))


@rule("take_along_dim")
def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        raise Declined
    axis = axis_of(input, dim)
    decline_out_of_range(indices, input.shape[axis], lead((input, indices)))
    return beside(lambda x, i: torch.take_along_dim(x, i, axis), (input, indices), (axis,), broadcast=True)


_ADDING = ("index_add_", "scatter_add_")


def _indexed(func: Any) -> Any:
    """The rule of func(input, dim, index, ...): `index` has the axes of the input, or numbers entries of one axis."""
    name = func.__name__
    changes, of_axis = name.endswith("_"), name.startswith("index")
    function = getattr(torch.Tensor, name.removesuffix("_"))

    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(func, args, kwargs)
        if given is None or not isinstance(given["dim"], int) or given["input"].ndim == 0:
            raise Declined
        target, index = given.pop("input"), given.pop("index")
        axis = axis_of(target, given.pop("dim"))
        others = {key: given.pop(key) for key in ("src", "source") if isinstance(given.get(key), Tensor)}
        given = {key: whole(x) for key, x in given.items()}
        operands = [target, *others.values()] if of_axis else [target, index, *others.values()]
        decline_out_of_range(index, target.shape[axis], lead((*operands, index)))
        index = whole(index) if of_axis else index

        def local(x: Tensor, *rest: Tensor) -> Tensor:
            places, values = (index, rest) if of_axis else (rest[0], rest[1:])
            return function(x, axis, places, **dict(zip(others, values, strict=True)), **given)

        if not changes:
            return beside(local, operands, (axis,))
        if is_slab(target):
            if target.strides is not None and windows_overlap(target.shape, target.strides):
                raise Declined
            operands[0] = target.like(target.local.clone())  # which the backward may need as it was
            assign(target.local, cut_along(beside(local, operands, (axis,)), target.cut, target))
            return target
        if name not in _ADDING or not is_slab(operands[-1]) or operands[-1].cut != axis:
            raise Declined
        source = operands[-1]
        mine = [torch.zeros_like(target), *([] if of_axis else [_same_part(index, axis, source)]), source.local]
        index = own(index, 0, source) if of_axis else index
        return target.add_(AllSum.apply(local(*mine), source.group))

    return call


def _same_part(index: Tensor, axis: int, source: Slab) -> Tensor:
    if index.shape != source.shape:
        raise Declined
    return cut_along(index, axis, source)


for _name in ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill"):
    for _func in [*torch_functions(_name), *torch_functions(f"{_name}_")]:
        register_rule(_func, _indexed(_func))


@rule("linalg.cross")
def linalg_cross(input: Tensor, other: Tensor, *, dim: int = -1) -> Any:
    axis = axis_of(lead((input, other)), dim)
    return beside(lambda a, b: torch.linalg.cross(a, b, dim=axis), (input, other), (axis,), broadcast=True)


@rule("torch.cross", "Tensor.cross")
def cross(input: Tensor, other: Tensor, dim: int | None = None) -> Any:
    """Without `dim`, along the first axis of length 3."""
    if input.shape != other.shape or (dim is None and 3 not in input.shape):
        raise Declined
    return linalg_cross(input, other, dim=input.shape.index(3) if dim is None else dim)


@rule("index_put")
def index_put(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    """Of one list of rows, as `index_add` has it."""
    first = indices[0]
    if len(indices) != 1 or not accumulate or not isinstance(first, Tensor) or first.ndim != 1 or is_slab(first):
        raise Declined
    if first.dtype == torch.bool or tuple(values.shape) != (len(first), *input.shape[1:]):
        raise Declined
    decline_out_of_range(first, input.shape[0], lead((input, values)))
    return beside(lambda x, y: x.index_add(0, first, y), (input, values), (0,))


@rule("F.embedding")
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not is_slab(input) or is_slab(weight) or scale_grad_by_freq or sparse:
        raise Declined
    decline_out_of_range(input, weight.shape[0], input)
    return input.like(F.embedding(input.local, weight, padding_idx))


@rule("F.one_hot")
def one_hot(input: Slab, num_classes: int = -1) -> Slab:
    if num_classes < 1:
        raise Declined  # as many as the largest entry tells
    decline_out_of_range(input, num_classes, input)
    return input.like(F.one_hot(input.local, num_classes))


@rule("bucketize")
def bucketize(input: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Any:
    if not is_slab(input) or boundaries.ndim != 1:
        raise Declined
    return input.like(torch.bucketize(input.local, whole(boundaries), out_int32=out_int32, right=right))


@rule("searchsorted")
def searchsorted(
    sorted_sequence: Tensor, input: Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None
) -> Any:
    if not is_slab(input) or sorted_sequence.ndim != 1:
        raise Declined
    found = torch.searchsorted(whole(sorted_sequence), input.local, out_int32=out_int32, right=right, side=side)
    return input.like(found)


@rule("isin", test_element="test_elements")
def isin(elements: Tensor, test_elements: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    if not is_slab(elements):
        raise Declined
    found = torch.isin(elements.local, whole(test_elements), assume_unique=assume_unique, invert=invert)
    return elements.like(found)
