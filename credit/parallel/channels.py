"""A tensor of which every tensor-parallel rank holds its channels, and which a block takes for the whole.

What stands between the column layer and the row layer of a block works on `Channels`: the shape is that of all
channels, the values are this rank's. The rules are those of `Slab`, so an operation either needs no other channels
(pointwise, attention by heads, depthwise convolution, group norm by whole groups, rearranging axes), or it would
move channels between ranks, and is refused. Under domain parallelism the local tensor is a `Slab` of rows.

Gradients (Shoeybi et al. 2019, Megatron-LM): whatever is whole and meets a rank's channels (the input of the column
layer, a weight, a position bias) gets a part of its cotangent on every rank, and the parts are summed; what the row
layer adds up over ranks hands its cotangent to all of them.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from credit.domain_parallel.groups import Messages, RankGroup, Reduction
from credit.domain_parallel.slab import ASKS, RULES, Slab, answers, refuse, rules_of, running
from credit.domain_parallel.torch_private import torch_function_off, tree_iter, tree_map_only


class ChannelGroup(RankGroup):
    """The ranks that share a tensor's channels. It moves no channels: rules that would, stop.

    Args:
        ranks: what sums go over.
        mesh: 1-D, of these ranks; None where there is none, and parameters are plain tensors.
    """

    def __init__(self, ranks: RankGroup, mesh: DeviceMesh | None = None) -> None:
        super().__init__(ranks.rank, ranks.size)
        self.ranks, self.mesh = ranks, mesh
        self.traffic = ranks.traffic

    def _all_reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        self._refuse()

    def _all_gather(self, values: Tensor) -> Tensor:
        self._refuse()

    def _start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages:
        if outgoing or incoming:
            self._refuse()
        return Messages(dict)

    def allow_messages(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        refuse(running(), "it would move channels between ranks")

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' `partial`, on all of them."""
        return _on_rows(_Sum, partial, self.ranks)

    def spread(self, x: Tensor) -> Tensor:
        """`x`, of which each rank will use a part: the parts of its cotangent are summed."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return x
        if x.layout is not torch.strided:
            refuse(running(), "a sparse tensor takes part, whose gradient is not summed over ranks")
        return _on_rows(_Spread, x, self.ranks)

    def as_parameter(self, mine: Tensor, dim: int) -> Tensor:
        """The tensor whose axis `dim` is cut over the ranks, of which this one has `mine`."""
        return mine if self.mesh is None else DTensor.from_local(mine, self.mesh, [Shard(dim)], run_check=False)


def _on_rows(function: Any, x: Tensor, ranks: RankGroup) -> Tensor:
    return x.like(function.apply(x.local, ranks)) if isinstance(x, Slab) else function.apply(x, ranks)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, ranks: RankGroup) -> Tensor:
        return ranks.all_reduce(partial)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: RankGroup) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.ranks), None


class Channels(Slab):
    """This rank's channels of a tensor.

    Attributes:
        group: the tensor-parallel ranks that share it.
    """

    group: ChannelGroup

    described: ClassVar[str] = "channels cut over tensor-parallel ranks"
    remedy: ClassVar[str] = (
        "Between _tp_col and _tp_row only operations may stand that keep to a rank's channels (whole heads, whole "
        "groups; fused projections are declared as _tp_fused). Change the block, or use tensor: 1."
    )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if func in ASKS and rule == func:  # asked of the tensor itself: its shape, its type
            with torch_function_off():
                return func(*args, **kwargs)
        with rules_of(cls, func):
            if func in RULES:  # a body in Python that is run instead meets the channels itself
                group = _group_of(args, kwargs)
                args, kwargs = tree_map_only(Tensor, lambda x: _enter(x, group), (args, kwargs))
            return answers[0](func, args, kwargs, types)


# As for Slab: opt_einsum picks the functions it calls by the name of the tensor's module.
Channels.__module__ = "torch"


def _group_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChannelGroup:
    return next(x.group for x in tree_iter((args, kwargs)) if isinstance(x, Channels))


def _enter(x: Tensor, group: ChannelGroup) -> Tensor:
    return x if isinstance(x, Channels) else group.spread(x)
