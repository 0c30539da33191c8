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
from credit.domain_parallel.rules.pointwise import align, lead, result, updated, writable
from credit.domain_parallel.slab import RULES, Slab, getter, is_slab, refuse, rule


def _sizes(shape: tuple) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)


def _resolved(new: tuple[int, ...], total: int) -> tuple[int, ...]:
    if -1 not in new:
        return new
    known = prod(n for n in new if n != -1)
    return tuple(total // known if n == -1 else n for n in new)


@rule("Tensor.view")
def view(x: Slab, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or isinstance(shape[0], torch.dtype):
        refuse("view as another dtype", "its rows would be reinterpreted")
    y = reshape(x, *shape)
    if not is_slab(y) or isinstance(y._local, Slab):  # a slab within this one has seen to it
        return y
    # A view shares memory with its base; where rows were exchanged it cannot.
    shares = y._local.untyped_storage().data_ptr() == x._local.untyped_storage().data_ptr()
    return y if shares else y.remember_source(x)


@rule("reshape")
def reshape(x: Slab, *shape: Any, **kwargs: Any) -> Any:
    new = _resolved(_sizes(shape or (kwargs["shape"],)), x.numel())
    if new == tuple(x.shape):
        return x
    # An empty tensor does not tell which axes are made of which, and is whole everywhere at no cost.
    found = regroup(tuple(x.shape), new, x.cut, x.partition) if x.numel() else None
    if found is None:
        return whole(x).reshape(new)
    x = recut(x, found.before)
    local = list(new)
    local[found.axis] = found.after.size(x.group.rank)
    return x.like(x.local.reshape(local), found.axis, found.after)


@rule("flatten", "ravel")
def flatten(x: Slab, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return reshape(x, (*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


@rule("unflatten")
def unflatten(x: Slab, dim: int, sizes: Sequence[int]) -> Any:
    dim %= x.ndim
    return reshape(x, (*x.shape[:dim], *_resolved(tuple(sizes), x.shape[dim]), *x.shape[dim + 1 :]))


@rule("view_as", "reshape_as")
def view_as(x: Slab, other: Tensor) -> Any:
    return reshape(x, tuple(other.shape))


@rule("squeeze")
def squeeze(x: Slab, dim: Any = None) -> Any:
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim)]
    dropped = [d for d in dims if x.shape[d] == 1]
    local = x.local
    for d in sorted(dropped, reverse=True):
        local = local.squeeze(d)
    return x.like(local, x.cut - sum(d < x.cut for d in dropped))


@rule("unsqueeze")
def unsqueeze(x: Slab, dim: int) -> Slab:
    dim %= x.ndim + 1
    return x.like(x.local.unsqueeze(dim), x.cut + (dim <= x.cut))


@rule("permute")
def permute(x: Slab, *dims: Any, **kwargs: Any) -> Slab:
    order = [d % x.ndim for d in _sizes(dims or (kwargs["dims"],))]
    return x.like(x.local.permute(order), order.index(x.cut))


@rule("transpose", "swapaxes", "swapdims")
def transpose(x: Slab, dim0: int, dim1: int) -> Slab:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(x, order)


@rule("movedim", "moveaxis")
def movedim(x: Slab, source: Any, destination: Any) -> Slab:
    source = [source] if isinstance(source, int) else source
    destination = [destination] if isinstance(destination, int) else destination
    places = {d % x.ndim: s % x.ndim for s, d in zip(source, destination, strict=True)}
    rest = iter([axis for axis in range(x.ndim) if axis not in places.values()])
    return permute(x, [places[d] if d in places else next(rest) for d in range(x.ndim)])


def _t(x: Slab) -> Slab:
    return transpose(x, -2, -1) if x.ndim > 1 else x


RULES.update({torch.t: _t, torch.Tensor.t: _t, getter("T"): lambda x: permute(x, range(x.ndim)[::-1])})
RULES.update({getter("mT"): _t, torch.adjoint: _t})


@rule("expand", "broadcast_to")
def expand(x: Slab, *sizes: Any) -> Slab:
    new = list(_sizes(sizes))
    axis = x.cut + len(new) - x.ndim
    if new[axis] not in (-1, x.shape[x.cut]):
        raise RuntimeError(f"cannot expand {x.shape[x.cut]} rows to {new[axis]}")
    new[axis] = -1
    return result(x.local.expand(new), x)


@rule("expand_as")
def expand_as(x: Tensor, other: Tensor) -> Any:
    return expand(x, tuple(other.shape)) if is_slab(x) else x.expand(tuple(other.shape))


@rule("repeat", "tile")
def repeat(x: Slab, *sizes: Any) -> Slab:
    times = list(_sizes(sizes))
    times = [1] * (x.ndim - len(times)) + times
    axis = x.cut + len(times) - x.ndim
    p = x.partition
    return x.like(x.local.repeat(times), axis, Partition(p.rows, p.parts, p.outer * times[axis], p.inner))


@rule("repeat_interleave")
def repeat_interleave(x: Slab, repeats: Any, dim: int | None = None, **kwargs: Any) -> Slab:
    if dim is None or not isinstance(repeats, int):
        refuse("repeat_interleave without dim or with a tensor of repeats", "it has no rule")
    p = x.partition
    inner = p.inner * repeats if dim % x.ndim == x.cut else p.inner
    return x.like(x.local.repeat_interleave(repeats, dim, **kwargs), x.cut, Partition(p.rows, p.parts, p.outer, inner))


@rule("view_as_real")
def view_as_real(x: Slab) -> Slab:
    return x.like(torch.view_as_real(x.local))


@rule("view_as_complex")
def view_as_complex(x: Slab) -> Slab:
    return x.like(torch.view_as_complex(x.local))


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
    y = rows_at(x, range(start, stop))
    return y if y is x else _sliced(x, y, is_view=True)


@rule("narrow")
def narrow(x: Slab, dim: int, start: int, length: int) -> Any:
    start = int(start) % (x.shape[dim] + 1) if start < 0 else int(start)
    return narrow_to(x, dim % x.ndim, start, start + length)


@rule("select")
def select_one(x: Slab, dim: int, index: int) -> Any:
    return getitem(x, (slice(None),) * (dim % x.ndim) + (int(index),))


@rule("unbind")
def unbind(x: Slab, dim: int = 0) -> tuple:
    if dim % x.ndim == x.cut:
        return tuple(_sliced(x, row, is_view=True) for row in whole(x).unbind(dim))
    return result(x.local.unbind(dim), x, _after_dropping(x, {dim % x.ndim}))


def _after_dropping(x: Slab, dims: set[int]) -> int:
    """Where the cut is, from the end, once these other axes are gone."""
    return x.cut - x.ndim + sum(d > x.cut for d in dims)


RULES[torch.Tensor.__iter__] = lambda x: iter(unbind(x))


@rule("split", "split_with_sizes")
def split(x: Slab, split_size: Any, dim: int = 0, **kwargs: Any) -> Any:
    dim %= x.ndim
    length = x.shape[dim]
    sizes = split_size
    if isinstance(split_size, int):
        sizes = [min(split_size, length - i) for i in range(0, max(length, 1), split_size)]
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(narrow_to(x, dim, stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


@rule("chunk")
def chunk(x: Slab, chunks: int, dim: int = 0) -> Any:
    return split(x, -(-x.shape[dim] // chunks), dim)


@rule("tensor_split")
def tensor_split(x: Slab, sections: Any, dim: int = 0) -> Any:
    if not isinstance(sections, int):
        stops = [*sections, x.shape[dim]]
        return split(x, [stop - start for start, stop in zip([0, *sections], stops, strict=True)], dim)
    return split(x, list(Partition(x.shape[dim], sections).sizes), dim)


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    # An empty 1-D tensor is skipped, as torch does.
    tensors = [x for x in tensors if is_slab(x) or x.shape != (0,)]
    like = lead(list(tensors))
    dim %= like.ndim
    if dim != like.cut:
        return like.like(torch.cat([cut_along(x, like.cut, like) for x in tensors], dim))
    length = sum(x.shape[dim] for x in tensors)
    target = Partition(length, like.group.size)
    mine = target.range(like.group.rank)
    pieces, top = [], 0
    for x in tensors:
        if is_slab(x):
            x = x if x.cut == dim else reshard(x, dim)
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
def stack(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    like = lead(list(tensors))
    dim %= like.ndim + 1
    return like.like(torch.stack([cut_along(x, like.cut, like) for x in tensors], dim), like.cut + (dim <= like.cut))


@rule("meshgrid", "broadcast_tensors")
def broadcast_tensors(*tensors: Any, **kwargs: Any) -> Any:
    refuse("meshgrid or broadcast_tensors of fields", "it has no rule")


@rule("__getitem__")
def getitem(x: Tensor, index: Any) -> Any:
    if not is_slab(x):
        return x[_whole_index(index)]
    items = _spelled_out(x, index)
    if items is None:
        refuse("indexing with a mask of several axes", "the number of entries each rank would hold is not known")
    at = _position(items, x.cut)
    item, length = items[at], x.shape[x.cut]
    is_view = not any(isinstance(i, Tensor | list) for i in items)
    if isinstance(item, int):
        return _sliced(x, rows_at(x, [range(length)[item]])[(*items[:at], 0, *items[at + 1 :])], is_view)
    if isinstance(item, slice):
        rows: Sequence[int] = range(length)[item]
    else:
        found = torch.arange(length)[torch.as_tensor(whole(item)).cpu()]
        if found.ndim != 1 or sum(isinstance(i, Tensor | list) for i in items) > 1:
            return whole(x)[_whole_index(tuple(items))]
        rows = found.tolist()
    y = rows_at(x, rows)
    rest = (*items[:at], slice(None), *items[at + 1 :])
    if y is x:
        return _index_others(x, rest)
    return _sliced(x, _index_others(y, rest) if is_slab(y) else y[rest], is_view)


def _sliced(x: Slab, y: Any, is_view: bool) -> Any:
    """`y`, whose rows are a copy of rows of `x`: where torch makes a view, neither may be changed in place."""
    if is_view and is_slab(y):
        return y.remember_source(x)
    if is_view:
        x.copies.append((y, y._version))
    return y


def _whole_index(index: Any) -> Any:
    return tuple(whole(i) for i in index) if isinstance(index, tuple) else whole(index)


def _spelled_out(x: Slab, index: Any) -> list | None:
    """The index with an item for every axis; None if a mask spans several axes."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) and i.ndim > 1 for i in items):
        return None
    items = [int(i) if isinstance(i, Tensor) and i.ndim == 0 and not is_slab(i) else i for i in items]
    used = sum(i is not None and i is not Ellipsis for i in items)
    if not any(i is Ellipsis for i in items):
        items.append(Ellipsis)
    where = next(n for n, i in enumerate(items) if i is Ellipsis)
    return [*items[:where], *[slice(None)] * (x.ndim - used), *items[where + 1 :]]


def _position(items: list, axis: int) -> int:
    """Where in the index the item of `axis` is (None adds an axis and takes none)."""
    for position, item in enumerate(items):
        if item is not None:
            if axis == 0:
                return position
            axis -= 1
    raise IndexError("too few items")


def _index_others(x: Slab, items: tuple) -> Slab:
    """Index the axes that are not cut; where the cut goes is seen on tensors that hold no values."""
    items = tuple(whole(i) for i in items)
    sizes = []
    for rows in (2, 3):
        probe = list(x.shape)
        probe[x.cut] = rows
        sizes.append(torch.empty(probe, device="meta")[tuple(_to_meta(i) for i in items)].shape)
    cut = next(axis for axis, (two, three) in enumerate(zip(*sizes, strict=True)) if two != three)
    return x.like(x.local[items], cut)


def _to_meta(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return (item.nonzero()[:, 0] if item.dtype == torch.bool else item).to("meta")


@rule("__setitem__")
def setitem(x: Tensor, index: Any, value: Any) -> None:
    if not is_slab(x):
        x[_whole_index(index)] = whole(value)
        return
    x.copies = [(y, version) for y, version in x.copies if y is not value]  # x[0] += 1 assigns what it changed
    writable(x, "assignment")
    items = _spelled_out(x, index)
    if items is None:
        refuse("assignment by a mask of several axes", "the number of entries each rank holds is not known")
    at = _position(items, x.cut)
    if items[at] != slice(None):
        _set_rows(x, items, at, value)
        return
    if isinstance(value, Tensor):
        target = _index_others(x.like(x.local.detach()), tuple(items))
        value = align(value, target)
    x._local[tuple(whole(i) for i in items)] = value
    updated(x)


def _set_rows(x: Slab, items: list, at: int, value: Any) -> None:
    """Assign to some rows: every rank takes from the whole value what falls on its own."""
    if any(isinstance(item, Tensor | list) for item in items) or x.partition.outer > 1:
        refuse("assignment to some rows by tensors", "it has no rule", "Use torch.cat or torch.where.")
    length, item = x.shape[x.cut], items[at]
    rows = range(length)[item] if isinstance(item, slice) else range(length)[item : item + 1 or None]
    mine = x.partition.indices(x.group.rank)
    places = [place for place, row in enumerate(rows) if row in mine]
    value = whole(value)
    after = sum(not isinstance(item, int) for item in items[at + 1 :])  # axes after the rows
    if isinstance(value, Tensor) and isinstance(item, int):
        value = value.unsqueeze(value.ndim - after) if value.ndim > after else value
    elif isinstance(value, Tensor) and value.ndim > after and value.shape[-1 - after] > 1:
        value = value.narrow(value.ndim - 1 - after, places[0] if places else 0, len(places))
    first = rows[places[0]] - mine[0] if places else 0
    local = slice(first, first + len(places) * rows.step, rows.step)
    x._local[(*items[:at], local, *items[at + 1 :])] = value
    updated(x)


@rule("index_select")
def index_select(x: Slab, dim: int, index: Tensor) -> Any:
    if dim % x.ndim == x.cut:
        return rows_at(x, whole(index).tolist())
    return x.like(x.local.index_select(dim, whole(index)))


@rule("flip")
def flip(x: Slab, *dims: Any) -> Any:
    axes = [d % x.ndim for d in _sizes(dims)]
    y = x.like(x.local.flip([d for d in axes if d != x.cut]))
    return rows_at(y, range(x.shape[x.cut] - 1, -1, -1)) if x.cut in axes else y


RULES[torch.flipud] = lambda x: flip(x, 0)
RULES[torch.fliplr] = lambda x: flip(x, 1)


@rule("roll")
def roll(x: Slab, shifts: Any, dims: Any = None) -> Any:
    if dims is None:
        refuse("roll without dims", "it shifts the flattened field")
    shifts = (shifts,) if isinstance(shifts, int) else shifts
    dims = (dims,) if isinstance(dims, int) else dims
    for shift, dim in zip(shifts, dims, strict=True):
        length = x.shape[dim]
        if dim % x.ndim == x.cut:
            x = rows_at(x, [(row - shift) % length for row in range(length)] if shift % length else range(length))
        else:
            x = x.like(x.local.roll(shift, dim))
    return x
