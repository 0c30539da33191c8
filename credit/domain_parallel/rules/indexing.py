"""Python's brackets: reading, and assigning to, slices, rows and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.reshard import cut_along, whole
from credit.domain_parallel.rules.axes import axis_of
from credit.domain_parallel.rules.elementwise import align
from credit.domain_parallel.rules.reshape import rows_at
from credit.domain_parallel.slab import Declined, Slab, is_slab, rule


@rule("__getitem__")
def getitem(input: Tensor, index: Any) -> Any:
    if not is_slab(input):
        return input[_whole_index(index)]
    items = _spelled_out(input, index)
    at = _position(items, input.cut)
    item, length = items[at], input.shape[input.cut]
    if isinstance(item, int):
        return rows_at(input, [range(length)[item]])[(*items[:at], 0, *items[at + 1 :])]
    if isinstance(item, slice):
        rows: Sequence[int] = range(length)[item]
    else:
        found = torch.arange(length)[torch.as_tensor(whole(item)).cpu()]
        if found.ndim != 1 or sum(isinstance(i, Tensor | list) for i in items) > 1:
            raise Declined
        rows = found.tolist()
    y = rows_at(input, rows)
    rest = (*items[:at], slice(None), *items[at + 1 :])
    if not is_slab(y):
        return y[rest]
    of_rows_alone = all(isinstance(i, slice) and i == slice(None) for i in rest)
    return y if y is not input and of_rows_alone else _index_others(y, rest)


def _whole_index(index: Any) -> Any:
    return tuple(whole(i) for i in index) if isinstance(index, tuple) else whole(index)


def _spelled_out(x: Slab, index: Any) -> list:
    """The index with an item for every axis; declined where an item takes several, or is of a kind seldom met."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [int(i) if isinstance(i, Tensor) and i.ndim == 0 and not is_slab(i) and _counts(i) else i for i in items]
    if not all(_is_simple(item) for item in items):
        raise Declined
    used = sum(i is not None and i is not Ellipsis for i in items)
    if used > x.ndim or sum(i is Ellipsis for i in items) > 1:
        raise Declined
    if not any(i is Ellipsis for i in items):
        items.append(Ellipsis)
    where = next(n for n, i in enumerate(items) if i is Ellipsis)
    return [*items[:where], *[slice(None)] * (x.ndim - used), *items[where + 1 :]]


def _counts(x: Tensor) -> bool:
    return x.dtype not in (torch.bool, torch.uint8) and not (x.is_floating_point() or x.is_complex())


def _is_simple(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim > 0 and not (item.ndim > 1 and not _counts(item))
    if isinstance(item, slice):
        return all(n is None or type(n) is int for n in (item.start, item.stop, item.step))
    if isinstance(item, list):
        return bool(item) and all(type(n) is int for n in item)
    return item is None or item is Ellipsis or type(item) is int


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
    if not any(isinstance(i, Tensor | list) for i in items):
        return x.like(x.local[items], sum(not isinstance(i, int) for i in items[: _position([*items], x.cut)]))
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
def setitem(input: Tensor, index: Any, value: Any) -> None:
    if not is_slab(input):
        input[_whole_index(index)] = whole(value)
        return
    if _is_mask_of(input, index) and (not isinstance(value, Tensor) or value.ndim == 0):
        input.local.masked_fill_(cut_along(index, input.cut, input), value)
        return
    items = _spelled_out(input, index)
    at = _position(items, input.cut)
    if items[at] != slice(None):
        _set_rows(input, items, at, value)
        return
    if isinstance(value, Tensor):
        target = _index_others(input.like(input.local.detach()), tuple(items))
        if value.ndim > target.ndim:
            raise Declined
        value = align(value, target)
    input.local[tuple(whole(i) for i in items)] = value


def _is_mask_of(x: Slab, index: Any) -> bool:
    """Of all entries of a floating tensor: others may not hold what is assigned."""
    mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape
    return mask and x.is_floating_point()


def _set_rows(x: Slab, items: list, at: int, value: Any) -> None:
    """Assign to some rows: every rank takes from the whole value what falls on its own."""
    if any(isinstance(item, Tensor | list) for item in items) or x.partition.outer > 1:
        raise Declined
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
    x.local[(*items[:at], local, *items[at + 1 :])] = value


@rule("index_select")
def index_select(input: Slab, dim: int, index: Tensor) -> Any:
    if not is_slab(input):
        raise Declined
    if axis_of(input, dim) == input.cut:
        return rows_at(input, whole(index).reshape(-1).tolist())
    return input.like(input.local.index_select(dim, whole(index)))


@rule("select")
def select_one(input: Slab, dim: int, index: int) -> Any:
    return getitem(input, (slice(None),) * axis_of(input, dim) + (index,))
