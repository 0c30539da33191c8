"""Moving a tensor between cuts: other rows, another axis, whole; and sums over the ranks that share it."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.constants import constants
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.halo_exchange import exchange, moved
from credit.domain_parallel.partition import Everything, Partition, PartitionError, RowMap, Rows, make_plan
from credit.domain_parallel.slab import Declined, Slab, is_slab
from credit.domain_parallel.torch_private import unsafe_view


def plain_partition(slab: Slab) -> Partition:
    """How an axis of this length is cut unless there is a reason."""
    return Partition(slab.shape[slab.cut], slab.group.size)


def recut(slab: Slab, partition: Partition) -> Slab:
    """The same tensor with the same axis cut otherwise. Free where every rank owns the same entries."""
    if partition == slab.partition:
        return slab
    source = slab.partition
    if source.outer == partition.outer == 1:
        # Entries that always stay together move together: the plan is made for blocks of them.
        block = gcd(source.inner, partition.inner)
        blocks = Partition(source.rows, source.parts, 1, source.inner // block)
        target = Partition(partition.rows, source.parts, 1, partition.inner // block)
    else:
        block, blocks, target = 1, source, partition
    local = _blocks(slab.local, slab.cut, block)
    plan = make_plan(Rows(range(target.length)), blocks, slab.group.rank, target)
    local = exchange(local, plan, slab.cut, slab.group)
    return slab.like(local.flatten(slab.cut, slab.cut + 1), partition=partition)


def _blocks(local: Tensor, axis: int, block: int) -> Tensor:
    return local.unflatten(axis, (local.shape[axis] // block, block))


def plain(slab: Slab) -> Slab:
    """The slab with its axis cut as `Partition(length, ranks)`."""
    return recut(slab, plain_partition(slab))


def select(slab: Slab, operator: RowMap, fill: float = 0.0) -> Slab | Tensor:
    """The rows that `operator` maps to: a slab cut plainly, or whole where there are fewer rows than ranks."""
    length = slab.shape[slab.cut]
    out = operator.out_length(length)
    if out < slab.group.size:
        rows = list(operator.needs(range(out), length)) if out else []
        plan = make_plan(Everything(tuple(rows)), slab.partition, slab.group.rank, _everyone(slab))
        return exchange(slab.local, plan, slab.cut, slab.group, fill)
    target = Partition(out, slab.group.size)
    plan = make_plan(operator, slab.partition, slab.group.rank, target)
    return slab.like(exchange(slab.local, plan, slab.cut, slab.group, fill), partition=target)


def _everyone(slab: Slab) -> Partition:
    """One output for each rank, so that each has what `Everything` needs."""
    return Partition(slab.group.size, slab.group.size)


def whole(x: Any) -> Any:
    """The global tensor on every rank, from a slab; anything else as it is."""
    if not is_slab(x):
        return x
    partition = x.partition
    block = partition.inner
    blocks = Partition(partition.rows, partition.parts, partition.outer)
    plan = make_plan(Everything(), blocks, x.group.rank, _everyone(x))
    local = exchange(_blocks(x.local, x.cut, block), plan, x.cut, x.group)
    return local.flatten(x.cut, x.cut + 1)


def own(x: Tensor, axis: int, like: Slab) -> Tensor:
    """This rank's part of a whole tensor whose `axis` runs along the cut of `like`."""
    if x.layout is not torch.strided:
        raise Declined("sparse tensors are not cut")
    return part(x, axis, like.partition, like.group.rank)


def cut_along(x: Tensor, axis: int, like: Slab) -> Tensor:
    """This rank's part of `x`, whole or a slab, whose `axis` runs along the cut of `like`."""
    if not is_slab(x):
        return own(x, axis, like)
    return recut(reshard(x, axis), like.partition).local


def is_dealt_evenly(slab: Slab, groups: int) -> bool:
    """True if every rank holds the same number of whole groups, of `groups` equal ones along the cut, in order."""
    partition = slab.partition
    return partition.outer == 1 and partition.rows % partition.parts == 0 and groups % partition.parts == 0


def other_axis(slab: Slab, taken: tuple[int, ...] = ()) -> int | None:
    """The axis to cut instead of the one that is: the first long enough that is not `taken`."""
    for axis, length in enumerate(slab.shape):
        if axis != slab.cut and axis not in taken and length >= slab.group.size:
            return axis
    return None


def reshard(slab: Slab, cut: int) -> Slab:
    """The same tensor cut along an axis: if that is another, an all-to-all in which every rank sends to each once."""
    if slab.cut == cut:
        return slab
    if slab.shape[cut] < slab.group.size:
        raise PartitionError(f"an axis of {slab.shape[cut]} entries cannot be cut over {slab.group.size} ranks")
    moved()
    slab.group.allow_messages()
    target = Partition(slab.shape[cut], slab.group.size)
    local = _Transpose.apply(slab.local, (slab.cut, slab.partition), (cut, target), slab.group)
    return slab.like(local, cut, target)


Cut = tuple[int, Partition]


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Cut, target: Cut, group: RankGroup) -> Tensor:
        ctx.geometry = target, source, group
        return _all_to_all(x, source, target, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Transpose.apply(grad, *ctx.geometry), None, None, None


def _all_to_all(x: Tensor, source: Cut, target: Cut, group: RankGroup) -> Tensor:
    (old_axis, old), (axis, new) = source, target
    rank, peers = group.rank, range(group.size)
    parts = {peer: part(x, axis, new, peer) for peer in peers}
    shape = list(parts[rank].shape)
    shapes = {peer: [*shape[:old_axis], old.size(peer), *shape[old_axis + 1 :]] for peer in peers if peer != rank}
    mine = parts.pop(rank)
    received = {rank: mine, **group.start(parts, shapes, x).wait()}
    # Within each outer index the ranks' rows follow one another.
    pieces = [received[peer].unflatten(old_axis, (old.outer, -1)) for peer in peers]
    joined = torch.cat(pieces, old_axis + 1)
    shape = [*joined.shape[:old_axis], old.length, *joined.shape[old_axis + 2 :]]
    # Not as a view: what an autograd function returns could then not be changed in place.
    return unsafe_view(joined, shape)


def part(x: Tensor, axis: int, partition: Partition, rank: int) -> Tensor:
    """What `rank` owns of a whole tensor whose `axis` is cut as `partition` says."""
    rows = partition.range(rank)
    if partition.outer == 1:
        return x.narrow(axis, rows.start * partition.inner, len(rows) * partition.inner)
    x = x.unflatten(axis, (partition.outer, partition.rows, partition.inner)).narrow(axis + 1, rows.start, len(rows))
    return x.flatten(axis, axis + 2)


def joined(parts: Tensor, axis: int, partition: Partition) -> Tensor:
    """The whole tensor, from what the ranks own of it, one after another along `axis`: the inverse of `part`."""
    return torch.empty_like(parts).index_copy_(axis, _order(partition, parts.device), parts)


@constants
def _order(partition: Partition, device: torch.device) -> Tensor:
    return torch.tensor(partition.order, device=device)


class AllSum(torch.autograd.Function):
    """The sum of what the ranks hold, on every rank; the backward sums the ranks' parts of the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllSum.apply(grad, ctx.group), None


class Once(torch.autograd.Function):
    """A whole tensor of which every rank finds the same gradient, which is to count once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x) if x.layout is torch.strided else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad if ctx.group.rank == 0 else torch.zeros_like(grad)), None


class AllExtreme(torch.autograd.Function):
    """Largest (sign 1) or smallest (-1) over `dims` of all ranks' rows; ties share the gradient, as in torch.amax."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], sign: int, group: RankGroup) -> Tensor:
        extreme = torch.amax if sign > 0 else torch.amin
        mine = extreme(x, dims, keepdim=True)
        value = extreme(group.all_gather(mine), 0)  # not by a MAX on the wire, which may lose what is no number
        ctx.save_for_backward(x, value)
        ctx.dims, ctx.group = dims, group
        return value.clone()  # what is returned may be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value = ctx.saved_tensors
        chosen = x == value
        sums = torch.stack([grad, chosen.sum(ctx.dims, keepdim=True).to(grad.dtype)])
        total, count = ctx.group.all_reduce(sums)
        return chosen * (total / count), None, None, None
