"""The exchange: adjoint, counted on the wire, and inverse of cutting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from credit.domain_parallel import HaloExchange, gather_tensor, shard_batch, shard_tensor
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.partition import Everything, Partition, TransposedWindow, Window, make_plan
from tests.domain_parallel.parity import manager, on_ranks, ranks, relative

OPERATORS = st.sampled_from(
    [
        Window(3, 1, 1, 1, 1),
        Window(7, 1, 1, 3, 3, "reflect"),
        Window(5, 2, 1, 2, 2, "circular"),
        Window(4, 1, 3, 4, 5, "replicate"),
        TransposedWindow(4, 2, padding=1),
        Everything(),
    ]
)


def adjoint_defect(operator, length: int) -> float:
    """<F x, y> - <x, F* y>, summed over ranks, relative to <F x, y>."""
    torch.manual_seed(0)
    group = manager()
    plan = make_plan(operator, Partition(length, group.domain_world_size), group.domain_rank)
    x = shard_tensor(torch.randn(2, 3, length, 4, dtype=torch.float64), -2, group).requires_grad_()
    fx = exchange(x, plan, -2, group.group)
    y = torch.randn(fx.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(fx, x, y)
    products = torch.stack([(fx * y).sum(), (x * gradient).sum()]).detach()
    products = group.group.all_reduce(products)
    return float((products[0] - products[1]).abs() / products[0].abs())


@on_ranks
@given(size=ranks, operator=OPERATORS, length=st.integers(9, 30))
def test_backward_is_the_adjoint_of_forward(threads, size, operator, length) -> None:
    assert max(threads(size).run(adjoint_defect, operator, length)) < 1e-12


def second_derivative_defect() -> float:
    """The exchange is linear, so the derivative of its backward is its forward."""
    group = manager()
    plan = make_plan(Window(5, 1, 1, 2, 2, "reflect"), Partition(11, group.domain_world_size), group.domain_rank)
    torch.manual_seed(group.domain_rank)
    x = torch.randn(1, 1, plan.shard, 2, dtype=torch.float64, requires_grad=True)
    fx = exchange(x, plan, -2, group.group)
    y = torch.randn_like(fx, requires_grad=True)
    (gradient,) = torch.autograd.grad(fx, x, y, create_graph=True)
    (second,) = torch.autograd.grad(gradient, y, x.detach())
    return relative(second, fx)


def test_the_exchange_can_be_differentiated_twice(threads) -> None:
    assert max(threads(3).run(second_derivative_defect)) == 0


def halo_and_neighbours(width: int, length: int) -> tuple[torch.Tensor, tuple]:
    x = torch.arange(1.0, length + 1).view(1, 1, length, 1)
    padded = HaloExchange(width)(shard_tensor(x, -2, manager()))
    assert torch.equal(HaloExchange.trim(padded, width, width), shard_tensor(x, -2, manager()))
    return padded.flatten(), manager().neighbor_ranks()


def test_halo_exchange_puts_neighbouring_rows_and_zeros_past_the_poles(threads) -> None:
    found = threads(3).run(halo_and_neighbours, 2, 7)
    assert [rows.tolist() for rows, _ in found] == [[0, 0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 0]]
    assert [neighbours for _, neighbours in found] == [(None, 1), (0, 2), (1, None)]


def gather_defect(length: int) -> tuple[float, float]:
    torch.manual_seed(0)
    whole = torch.randn(2, 3, length, 4)
    shard = shard_tensor(whole, -2, manager()).requires_grad_()
    gathered = gather_tensor(shard, -2, manager())
    gathered.sum().backward()
    return relative(gathered, whole), relative(shard.grad, torch.full_like(shard, manager().domain_world_size))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [5, 8, 13])
def test_gathering_undoes_cutting(threads, size, length) -> None:
    assert threads(size).run(gather_defect, length) == [(0.0, 0.0)] * size


def cut_batch() -> dict:
    batch = {"x": torch.zeros(2, 3, 1, 7, 4), "y": torch.zeros(2, 3, 7, 4), "lead": torch.zeros(2), "id": "a"}
    return {name: getattr(value, "shape", value) for name, value in shard_batch(batch, manager=manager()).items()}


def test_shard_batch_cuts_fields_and_nothing_else(threads) -> None:
    north, south = threads(2).run(cut_batch)
    assert north == {"x": (2, 3, 1, 4, 4), "y": (2, 3, 4, 4), "lead": (2,), "id": "a"}
    assert south["x"] == (2, 3, 1, 3, 4)


def conv_traffic(kernel: int, stride: int, padding: int, length: int) -> tuple[int, int, int, int]:
    """(messages, bytes) of a forward and of a backward."""
    from credit.domain_parallel import DomainParallelConv2d

    group = manager()
    layer = DomainParallelConv2d(torch.nn.Conv2d(2, 2, kernel, stride, padding))
    x = shard_tensor(torch.randn(1, 2, length, 8), -2, group).requires_grad_()
    group.traffic.reset()
    y = layer(x)
    forward = group.traffic.messages, group.traffic.bytes
    group.traffic.reset()
    y.sum().backward()
    return *forward, group.traffic.messages, group.traffic.bytes


ROW = 2 * 8 * 4  # channels x longitudes x bytes


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "rows_sent"),
    [
        (3, 1, 1, [(0, 1), (1, 1), (1, 0)]),  # one row each way
        (5, 1, 2, [(0, 2), (2, 2), (2, 0)]),
        (3, 2, 1, [(0, 1), (0, 1), (0, 0)]),  # a strided kernel reads from the north only
        (4, 4, 0, [(0, 0), (0, 0), (0, 0)]),  # aligned patches read nothing
    ],
)
def test_bytes_on_the_wire_are_the_rows_the_operator_needs(threads, kernel, stride, padding, rows_sent) -> None:
    """A forward sends exactly the halo rows, one message a neighbour; the backward returns their gradients."""
    found = threads(3).run(conv_traffic, kernel, stride, padding, 36)
    north, south = zip(*rows_sent, strict=True)
    received = [(south[rank - 1] if rank else 0) + (north[rank + 1] if rank < 2 else 0) for rank in range(3)]
    from_ranks = [(rank > 0 and south[rank - 1] > 0) + (rank < 2 and north[rank + 1] > 0) for rank in range(3)]
    for rank in range(3):
        messages, bytes_, messages_back, bytes_back = found[rank]
        assert (messages, bytes_) == (sum(n > 0 for n in rows_sent[rank]), sum(rows_sent[rank]) * ROW)
        assert (messages_back, bytes_back) == (from_ranks[rank], received[rank] * ROW)


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size 6 is not a multiple of domain_parallel_size 4"):
        DomainParallelManager(6, 4)


class _SumOfParts(torch.autograd.Function):
    """A whole tensor enters: its gradient is the sum of the ranks' parts."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return manager().group.all_reduce(grad)


def gradcheck_passes(operator, length: int) -> bool:
    """All ranks step through the numerical derivative of the whole in the same order."""
    group = manager()
    plan = make_plan(operator, Partition(length, group.domain_world_size), group.domain_rank)

    def whole(x: torch.Tensor) -> torch.Tensor:
        y = exchange(shard_tensor(_SumOfParts.apply(x), 0, group), plan, 0, group.group)
        mine = y.sin().sum()
        return _Total.apply(mine)

    torch.manual_seed(0)
    return torch.autograd.gradcheck(whole, torch.randn(length, 2, dtype=torch.float64, requires_grad=True))


class _Total(torch.autograd.Function):
    """The sum over ranks, on every rank; each rank's cotangent is the whole one."""

    @staticmethod
    def forward(ctx, x):
        return manager().group.all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "operator", [Window(3, 1, 1, 1, 1), Window(5, 2, 1, 2, 2, "reflect"), TransposedWindow(4, 2, 1, 1)]
)
def test_gradcheck(threads, operator) -> None:
    assert all(threads(3).run(gradcheck_passes, operator, 11))
