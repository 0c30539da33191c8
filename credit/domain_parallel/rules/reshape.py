"""Functions that rearrange axes: the cut moves along, or the rows are dealt out anew.

`reshape` is the one that matters. Merging a cut axis with others keeps every rank's entries (the cut is then inside the
axis, see `Partition`). Splitting it, as window attention does, makes windows that a plain cut may divide:
the rows are then exchanged so that every rank holds whole windows of the global grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Rows, make_plan
from credit.domain_parallel.regroup import regroup
from credit.domain_parallel.reshard import cut_along, recut, reshard, select, whole
from credit.domain_parallel.rules.axes import axis_of
from credit.domain_parallel.rules.elementwise import lead, result
from credit.domain_parallel.slab import COMPOSITE, Declined, Slab, getter, is_slab, register_rule, rule


def _resolved(new: Sequence[int], total: int) -> tuple[int, ...]:
    new = tuple(new)
    if -1 not in new:
        return new
    known = prod(n for n in new if n != -1)
    return tuple(total // max(known, 1) if n == -1 else n for n in new)


@rule("reshape", "Tensor.view", size="shape")
def reshape(input: Slab, shape: Sequence[int]) -> Any:
    new = _resolved(shape, input.numel())
    if new == tuple(input.shape):
        return input.like(input.local.view(input.local.shape))
    # An empty tensor does not tell which axes are made of which, and is whole everywhere at no cost.
    found = regroup(tuple(input.shape), new, input.cut, input.partition) if input.numel() else None
    if found is None:
        return whole(input).reshape(new)
    x = recut(input, found.before)
    local = list(new)
    local[found.axis] = found.after.size(x.group.rank)
    return x.like(x.local.reshape(local), found.axis, found.after)


@rule("flatten")
def flatten(input: Slab, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = axis_of(input, start_dim), axis_of(input, end_dim)
    return reshape(input, (*input.shape[:start], prod(input.shape[start : end + 1]), *input.shape[end + 1 :]))


@rule("ravel")
def ravel(input: Slab) -> Any:
    return reshape(input, (-1,))


@rule("unflatten")
def unflatten(input: Slab, dim: int, sizes: Sequence[int]) -> Any:
    axis = axis_of(input, dim)
    sizes = _resolved((sizes,) if isinstance(sizes, int) else sizes, input.shape[axis])
    return reshape(input, (*input.shape[:axis], *sizes, *input.shape[axis + 1 :]))


@rule("view_as", "reshape_as")
def view_as(input: Tensor, other: Tensor) -> Any:
    return reshape(input, tuple(other.shape)) if is_slab(input) else input.reshape(tuple(other.shape))


@rule("squeeze")
def squeeze(input: Slab, dim: Any = None) -> Any:
    dims = range(input.ndim) if dim is None else [axis_of(input, d) for d in ((dim,) if isinstance(dim, int) else dim)]
    dropped = [d for d in dims if input.shape[d] == 1]
    local = input.local
    for d in sorted(dropped, reverse=True):
        local = local.squeeze(d)
    return input.like(local if dropped else local.view(local.shape), input.cut - sum(d < input.cut for d in dropped))


@rule("unsqueeze")
def unsqueeze(input: Slab, dim: int) -> Slab:
    dim = dim + input.ndim + 1 if dim < 0 else dim
    return input.like(input.local.unsqueeze(dim), input.cut + (dim <= input.cut))


@rule("permute")
def permute(input: Slab, dims: Sequence[int]) -> Slab:
    order = [axis_of(input, d) for d in dims]
    return input.like(input.local.permute(order), order.index(input.cut))


@rule("transpose", "swapaxes", "swapdims", axis0="dim0", axis1="dim1")
def transpose(input: Slab, dim0: int, dim1: int) -> Slab:
    order = list(range(input.ndim))
    a, b = axis_of(input, dim0), axis_of(input, dim1)
    order[a], order[b] = order[b], order[a]
    return permute(input, order)


@rule("meshgrid")
def meshgrid(tensors: Sequence[Tensor], indexing: str | None = None) -> Any:
    """Each along an axis of its own."""
    given = [*tensors[0]] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else [*tensors]
    if any(x.ndim != 1 for x in given):
        raise Declined
    axes = [1, 0, *range(2, len(given))] if indexing == "xy" and len(given) > 1 else list(range(len(given)))
    shape = [0] * len(given)
    for axis, x in zip(axes, given, strict=True):
        shape[axis] = x.shape[0]

    def spread(x: Tensor, axis: int) -> Tensor:
        local = x.local if is_slab(x) else x
        lengths = [local.shape[0] if n == axis else length for n, length in enumerate(shape)]
        out = local.view([-1 if n == axis else 1 for n in range(len(shape))]).expand(lengths)
        return x.like(out, axis) if is_slab(x) else out

    return tuple(spread(x, axis) for axis, x in zip(axes, given, strict=True))


@rule("movedim", "moveaxis")
def movedim(input: Slab, source: Any, destination: Any) -> Slab:
    source = [source] if isinstance(source, int) else source
    destination = [destination] if isinstance(destination, int) else destination
    places = {axis_of(input, d): axis_of(input, s) for s, d in zip(source, destination, strict=True)}
    rest = iter([axis for axis in range(input.ndim) if axis not in places.values()])
    return permute(input, [places[d] if d in places else next(rest) for d in range(input.ndim)])


@rule("t")
def t(input: Slab) -> Slab:
    return transpose(input, 0, 1) if input.ndim == 2 else input.like(input.local.view(input.local.shape))


@rule("adjoint")
def adjoint(input: Slab) -> Slab:
    if input.is_complex():
        raise Declined
    return transpose(input, -2, -1)


register_rule(getter("T"), lambda x: permute(x, range(x.ndim)[::-1]))
register_rule(getter("mT"), lambda x: transpose(x, -2, -1))


@rule("expand", "broadcast_to")
def expand(input: Slab, size: Sequence[int]) -> Slab:
    new = list(size)
    axis = input.cut + len(new) - input.ndim
    new[axis] = -1  # a cut axis has more than one entry, and stays as it is
    return result(input.local.expand(new), input)


@rule("expand_as")
def expand_as(input: Tensor, other: Tensor) -> Any:
    return expand(input, tuple(other.shape)) if is_slab(input) else input.expand(tuple(other.shape))


@rule("repeat", "tile", dims="repeats")
def repeat(input: Slab, repeats: Sequence[int]) -> Slab:
    times = [1] * (input.ndim - len(repeats)) + list(repeats)
    axis = input.cut + len(times) - input.ndim
    if times[axis] == 0:
        raise Declined
    p = input.partition
    return input.like(input.local.repeat(times), axis, Partition(p.rows, p.parts, p.outer * times[axis], p.inner))


@rule("repeat_interleave")
def repeat_interleave(input: Slab, repeats: Any, dim: int | None = None) -> Slab:
    if dim is None or not isinstance(repeats, int) or repeats < 1:
        raise Declined
    p = input.partition
    inner = p.inner * repeats if axis_of(input, dim) == input.cut else p.inner
    local = input.local.repeat_interleave(repeats, dim)
    return input.like(local, input.cut, Partition(p.rows, p.parts, p.outer, inner))


@rule("view_as_real")
def view_as_real(input: Slab) -> Slab:
    return input.like(torch.view_as_real(input.local))


@rule("view_as_complex")
def view_as_complex(input: Slab) -> Slab:
    if input.cut == input.ndim - 1:
        raise Declined
    return input.like(torch.view_as_complex(input.local))


# Slices, joins


def rows_at(x: Slab, rows: Sequence[int | None]) -> Any:
    """Entries `rows` of the cut axis, in that order."""
    return x if rows == range(x.shape[x.cut]) else select(x, Rows(rows if isinstance(rows, range) else tuple(rows)))


def narrow_to(x: Slab, dim: int, start: int, stop: int) -> Any:
    if dim != x.cut:
        return x.like(x.local.narrow(dim, start, stop - start))
    p = x.partition
    turn = p.rows * p.inner  # one of the outer entries, such as the queries of fused queries, keys and values
    if p.outer > 1 and start < stop and start % turn == stop % turn == 0:
        mine = p.size(x.group.rank) // p.outer
        local = x.local.narrow(dim, start // turn * mine, (stop - start) // turn * mine)
        return x.like(local, partition=Partition(p.rows, p.parts, (stop - start) // turn, p.inner))
    return rows_at(x, range(start, stop))


@rule("narrow")
def narrow(input: Slab, dim: int, start: int, length: int) -> Any:
    axis = axis_of(input, dim)
    start = start + input.shape[axis] if start < 0 else start
    return narrow_to(input, axis, start, start + length)


@rule("unbind")
def unbind(input: Slab, dim: int = 0) -> tuple:
    axis = axis_of(input, dim)
    if axis == input.cut:
        return whole(input).unbind(axis)
    return result(input.local.unbind(axis), input, _after_dropping(input, {axis}))


def _after_dropping(x: Slab, dims: set[int]) -> int:
    """Where the cut is, from the end, once these other axes are gone."""
    return x.cut - x.ndim + sum(d > x.cut for d in dims)


COMPOSITE[torch.Tensor.__iter__] = lambda x: iter(torch.unbind(x))


@rule("split", "split_with_sizes", tensor="input", split_size_or_sections="split_size", split_sizes="split_size")
def split(input: Slab, split_size: Any, dim: int = 0) -> Any:
    axis = axis_of(input, dim)
    length, sizes = input.shape[axis], split_size
    if isinstance(split_size, int):
        sizes = [min(split_size, length - i) for i in range(0, max(length, 1), max(split_size, 1))]
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(narrow_to(input, axis, stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


@rule("chunk")
def chunk(input: Slab, chunks: int, dim: int = 0) -> Any:
    return split(input, max(-(-input.shape[axis_of(input, dim)] // chunks), 1), dim)


@rule("tensor_split")
def tensor_split(input: Slab, sections: int, dim: int = 0) -> Any:
    return split(input, list(Partition(input.shape[axis_of(input, dim)], sections).sizes), dim)


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    # An empty 1-D tensor is skipped, as torch does.
    tensors = [x for x in tensors if is_slab(x) or x.shape != (0,)]
    like = lead(tensors)
    if len({x.dtype for x in tensors}) > 1:
        raise Declined
    dim = axis_of(like, dim)
    if dim != like.cut:
        return like.like(torch.cat([cut_along(x, like.cut, like) for x in tensors], dim))
    length = sum(x.shape[dim] for x in tensors)
    target = Partition(length, like.group.size)
    mine = target.range(like.group.rank)
    pieces, top = [], 0
    for x in tensors:
        if is_slab(x):
            x = reshard(x, dim)
            pieces.append(_share(x, top, target))
        else:
            start, stop = (min(max(row - top, 0), x.shape[dim]) for row in (mine.start, mine.stop))
            pieces.append(x.narrow(dim, start, stop - start))
        top += x.shape[dim]
    return like.like(torch.cat(pieces, dim), dim, target)


def _share(x: Slab, top: int, target: Partition) -> Tensor:
    """The rows of `x` that this rank owns of a longer axis in which `x` begins at row `top`."""
    plan = make_plan(_Placed(top), x.partition, x.group.rank, target)
    return exchange(x.local, plan, x.cut, x.group)


class _Placed(Rows):
    """Rows of a tensor as part of a longer one, in which it begins at row `top`."""

    def __init__(self, top: int) -> None:
        super().__init__((top,))

    def needs(self, out: Sequence[int], length: int) -> list[int | None]:
        return [o - top for top in self.rows for o in out if top is not None and 0 <= o - top < length]


@rule("stack")
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    like = lead(tensors)
    dim = dim + like.ndim + 1 if dim < 0 else dim
    return like.like(torch.stack([cut_along(x, like.cut, like) for x in tensors], dim), like.cut + (dim <= like.cut))
