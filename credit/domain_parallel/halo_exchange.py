"""The one communication primitive: give every rank the rows its operator reads, differentiably.

`exchange` executes any `Plan`; its backward is the transposed plan (send the gradient of received rows back
to their owner and add). With F the exchange, <F x, y> = <x, F* y> holds to rounding. `HaloExchange` is the
symmetric case of the reference API.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from credit.domain_parallel.constants import constants
from credit.domain_parallel.groups import Messages, RankGroup
from credit.domain_parallel.lengths import global_length
from credit.domain_parallel.manager import DomainParallelError, get_domain_parallel_manager
from credit.domain_parallel.partition import Partition, Plan, Window, make_plan
from credit.domain_parallel.pieces import FILL, Piece, Run, Sum


class _State(threading.local):
    moves = 0


_state = _State()


def moved() -> None:
    """To be called where rows go from rank to rank: on every rank, also on those that keep theirs."""
    _state.moves += 1


def moves() -> int:
    """How often rows went from rank to rank in this thread."""
    return _state.moves


def exchange(x: Tensor, plan: Plan, dim: int, group: RankGroup, fill: float = 0.0) -> Tensor:
    """The rows of the global field that `plan` asks for, as one tensor.

    Args:
        x: this rank's shard, `plan.shard` rows along `dim`.
        plan: made by `make_plan` for this rank.
        dim: the sharded axis.
        group: the ranks that share the field.
        fill: what the rows past a pole hold that belong to no rank.

    Returns:
        A tensor of `plan.rows` rows along `dim`; `x` itself where it already is what is needed.
    """
    if not plan.stays:
        moved()
    if plan.sends_any:
        group.allow_messages()
    if plan.is_identity:
        return x
    return _Exchange.apply(x, plan, dim % x.ndim, group, fill)


def _with_rows(shape: torch.Size, dim: int, rows: int) -> list[int]:
    return [*shape[:dim], rows, *shape[dim + 1 :]]


def send_rows(x: Tensor, plan: Plan, dim: int, group: RankGroup) -> Messages:
    """Start the messages of `plan`: the rows of `x` that the peers need."""
    outgoing = {peer: _joined([x.narrow(dim, *run) for run in runs], dim) for peer, runs in plan.sends.items()}
    shapes = {peer: _with_rows(x.shape, dim, rows) for peer, rows in plan.receives.items()}
    return group.start(outgoing, shapes, x)


def _joined(rows: list[Tensor], dim: int) -> Tensor:
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim)


def assemble(source: dict[int, Tensor], pieces: Sequence[Piece], dim: int, like: Tensor, fill: float = 0.0) -> Tensor:
    """The rows that `pieces` tell, from what each rank gave: a new tensor."""
    rows = [
        _value(fill, like.dtype, like.device).expand(_with_rows(like.shape, dim, piece.count))
        if piece.source == FILL
        else _rows(source, piece, dim)
        for piece in pieces
    ]
    return torch.cat(rows, dim) if rows else like.narrow(dim, 0, 0)


@constants
def _value(fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(fill, dtype=dtype, device=device)


def _rows(source: dict[int, Tensor], piece: Piece, dim: int) -> Tensor:
    if piece.step == 1:
        return source[piece.source].narrow(dim, piece.first, piece.count)
    return source[piece.source].narrow(dim, piece.first - piece.count + 1, piece.count).flip(dim)


def _gather_rows(x: Tensor, plan: Plan, dim: int, group: RankGroup, fill: float = 0.0) -> Tensor:
    received = send_rows(x, plan, dim, group).wait()
    return assemble({plan.rank: x, **received}, plan.pieces, dim, x, fill)


def add_rows(total: Tensor, source: dict[int, Tensor], runs: Sequence[Run], dim: int) -> None:
    """Add to rows of `total` what `runs` tell, of what each rank gave."""
    for first, piece in runs:
        total.narrow(dim, first, piece.count).add_(_rows(source, piece, dim))


def _summed(source: dict[int, Tensor], rows: Sum, dim: int, like: Tensor) -> Tensor:
    """The rows that are such sums of what each rank gave: a view, where they are rows of one."""
    if len(rows.runs) == len(rows.pieces) == 1:
        return _rows(source, rows.pieces[0], dim)
    total = assemble(source, rows.pieces, dim, like)
    add_rows(total, source, rows.added, dim)
    return total


def send_gradients(grad: Tensor, plan: Plan, dim: int, group: RankGroup) -> Messages:
    """Start the messages of the transposed plan: the gradients of received rows go back to their owners."""
    outgoing = {peer: _summed({plan.rank: grad}, rows, dim, grad) for peer, rows in plan.gradients.items()}
    counts = {peer: sum(count for _, count in runs) for peer, runs in plan.sends.items()}
    return group.start(outgoing, {peer: _with_rows(grad.shape, dim, rows) for peer, rows in counts.items()}, grad)


def _scatter_add_rows(grad: Tensor, plan: Plan, dim: int, group: RankGroup) -> Tensor:
    """The transpose of `_gather_rows`."""
    received = send_gradients(grad, plan, dim, group).wait()
    return _summed({plan.rank: grad, **received}, plan.gradient, dim, grad)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, dim: int, group: RankGroup, fill: float) -> Tensor:
        ctx.geometry = plan, dim, group
        return _gather_rows(x, plan, dim, group, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ExchangeTransposed.apply(grad, *ctx.geometry), None, None, None, None


class _ExchangeTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, plan: Plan, dim: int, group: RankGroup) -> Tensor:
        ctx.geometry = plan, dim, group
        return _scatter_add_rows(grad, plan, dim, group)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(x, *ctx.geometry, 0.0), None, None, None


class _HaloExchangeFunction(torch.autograd.Function):
    """Symmetric halo exchange as an autograd function; see `HaloExchange`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo_width: int, dim: int, group: RankGroup) -> Tensor:
        length = global_length(x.shape[dim], group, "HaloExchange")
        window = Window(kernel=2 * halo_width + 1, before=halo_width, after=halo_width)
        plan = make_plan(window, Partition(length, group.size), group.rank)
        ctx.geometry = plan, dim % x.ndim, group
        return _gather_rows(x, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _ExchangeTransposed.apply(grad_output, *ctx.geometry), None, None, None


class HaloExchange(nn.Module):
    """Put `halo_width` rows of the neighbours before and after the shard, and zeros past the poles.

    Rows come from several ranks away where a shard is lower than the halo. Uses the global manager; without
    one, or with one domain rank, only the zeros are added.

    Args:
        halo_width: rows on each side.
        dim: the sharded axis, -2 for latitude in (..., latitude, longitude).
    """

    def __init__(self, halo_width: int, dim: int = -2) -> None:
        super().__init__()
        if halo_width < 0:
            raise ValueError(f"halo_width must not be negative, got {halo_width}")
        self.halo_width = halo_width
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """(..., rows, ...) to (..., halo_width + rows + halo_width, ...)."""
        manager = get_domain_parallel_manager()
        if manager is None or manager.domain_world_size == 1:
            zeros = x.new_zeros(_with_rows(x.shape, self.dim % x.ndim, self.halo_width))
            return torch.cat([zeros, x, zeros], self.dim)
        return _HaloExchangeFunction.apply(x, self.halo_width, self.dim, manager.group)

    @staticmethod
    def trim(x: Tensor, halo_before: int, halo_after: int, dim: int = -2) -> Tensor:
        """`x` without its first `halo_before` and last `halo_after` rows along `dim`."""
        rows = x.shape[dim] - halo_before - halo_after
        if min(halo_before, halo_after, rows) < 0:
            raise DomainParallelError(f"cannot trim {halo_before} + {halo_after} of {x.shape[dim]} rows")
        return x.narrow(dim, halo_before, rows)
