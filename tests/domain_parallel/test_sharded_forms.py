"""What weather models use has a sharded form: it is exact without gathering a field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from credit.domain_parallel import convert_to_domain_parallel, get_domain_parallel_manager, shard_tensor, verify_parity
from credit.domain_parallel.gathered import gathers_recorded
from credit.domain_parallel.thread_ranks import thread_ranks
from tests.domain_parallel import database

DOUBLE = torch.float64
NODES = 13 * 6
DRAW = torch.Generator().manual_seed(0)
FROM, TO = torch.randint(0, NODES, (2, 200), generator=DRAW)
WEIGHTS = torch.sparse_coo_tensor(
    torch.stack([torch.randint(0, 20, (100,), generator=DRAW), torch.randint(0, NODES, (100,), generator=DRAW)]),
    torch.rand(100, generator=DRAW, dtype=DOUBLE),
    (20, NODES),
)


class Uses(nn.Module):
    """A function, and the layers it may use."""

    def __init__(self, function: Callable[[Uses, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.lstm = nn.LSTM(4, 4)
        self.cell = nn.LSTMCell(4, 4)
        self.embedding = nn.Embedding(50, 4)
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def nodes(x: Tensor) -> Tensor:
    """The points of the first sample: (78, 4)."""
    return x.flatten(2).transpose(1, 2)[0]


def messages(x: Tensor) -> Tensor:
    """Of the edges of a graph."""
    return torch.tanh(nodes(x)[FROM])


def at(x: Tensor) -> Tensor:
    return TO[:, None].expand(-1, 4)


def added(start: Tensor, x: Tensor) -> Tensor:
    start.index_add_(0, TO, messages(x))
    return start * 2


def masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0.3] = 0.0
    return y


def classes(x: Tensor) -> Tensor:
    return x.detach().argmax(1)


def points(x: Tensor) -> Tensor:
    """As a batch of sequences of two: (156, 2, 4)."""
    return torch.stack([x, x * 2]).permute(1, 3, 4, 0, 2).reshape(-1, 2, 4)


SHARDED: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "index_add": lambda m, x: torch.zeros(NODES, 4, dtype=DOUBLE).index_add(0, TO, messages(x)),
    "index_add_": lambda m, x: added(nodes(x).clone(), x),
    "index_add_ to a whole tensor": lambda m, x: added(x.new_zeros(NODES, 4), x),
    "scatter_add": lambda m, x: x.new_zeros(NODES, 4).scatter_add(0, at(x), messages(x)),
    "scatter_reduce": lambda m, x: x.new_zeros(NODES, 4).scatter_reduce(0, at(x), messages(x), "mean"),
    "scatter": lambda m, x: x.scatter(2, torch.zeros(2, 4, 1, 6, dtype=torch.long), 0.5),
    "index_copy": lambda m, x: x.index_copy(2, torch.tensor([3, 1]), x[:, :, :2] * 2),
    "index_put": lambda m, x: x.new_zeros(NODES, 4).index_put((TO,), messages(x), accumulate=True),
    "gather": lambda m, x: x.gather(2, x.detach().argsort(2)),
    "take_along_dim": lambda m, x: x.take_along_dim(torch.arange(13).flip(0).view(1, 1, 13, 1), 2),
    "embedding": lambda m, x: m.embedding((x.detach().abs() * 5).long().clamp(0, 49)),
    "mask": lambda m, x: masked(x),
    "gradient": lambda m, x: torch.stack([*torch.gradient(x, spacing=2.0, dim=(2, 3), edge_order=2)]),
    "trapezoid": lambda m, x: torch.trapezoid(x, torch.linspace(0, 3, 13, dtype=DOUBLE) ** 2, dim=2),
    "cumulative_trapezoid": lambda m, x: torch.cumulative_trapezoid(x, dim=2),
    "cross": lambda m, x: torch.linalg.cross(x[:, :3], x[:, 1:], dim=1),
    "bce": lambda m, x: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid()),
    "bce with logits": lambda m, x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "cross_entropy": lambda m, x: F.cross_entropy(
        x, classes(x), m.weights.detach(), label_smoothing=0.1, ignore_index=2
    ),
    "cross_entropy of shares": lambda m, x: F.cross_entropy(x, (x.detach() * 2).softmax(1)),
    "nll_loss": lambda m, x: F.nll_loss(x.log_softmax(1), classes(x), reduction="sum"),
    "kl_div": lambda m, x: F.kl_div(x.log_softmax(1), (x.detach() * 2).softmax(1), reduction="batchmean"),
    "gaussian_nll_loss": lambda m, x: F.gaussian_nll_loss(x, x.detach() * 2, x.detach().abs() + 0.1),
    "outer": lambda m, x: torch.outer(x[0, 0, :, 0], x[0, 0, 0, :]),
    "meshgrid": lambda m, x: torch.stack(torch.meshgrid(x[0, 0, :, 0], x[0, 0, 0, :], indexing="xy")),
    "one_hot": lambda m, x: F.one_hot(classes(x), 4).double() * x[:, :1].movedim(1, -1),
    "bucketize": lambda m, x: torch.bucketize(x.detach(), torch.linspace(-1, 1, 5, dtype=DOUBLE)) * x,
    "searchsorted": lambda m, x: torch.searchsorted(torch.linspace(-1, 1, 5, dtype=DOUBLE), x.detach()) * x,
    "isin": lambda m, x: torch.isin(classes(x), torch.tensor([1, 2])) * x[:, 0],
    "gru": lambda m, x: m.gru(points(x))[0],
    "lstm": lambda m, x: torch.cat([y.flatten() for y in m.lstm(points(x).movedim(1, 0))[1]]),
    "lstm cell": lambda m, x: m.cell(nodes(x))[0],
    "max_pool2d with indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "sparse.mm": lambda m, x: torch.sparse.mm(WEIGHTS, nodes(x)),
    "sparse @": lambda m, x: WEIGHTS @ nodes(x),
    "quantile": lambda m, x: torch.quantile(x, 0.3, dim=2),
    "tril": lambda m, x: x.tril(-1),
    "rot90": lambda m, x: x.rot90(3, (2, 3)),
    "a power": lambda m, x: (x**2 + 2**x) ** 0.5,
}


@pytest.mark.parametrize("name", SHARDED)
def test_it_is_exact_and_nothing_is_gathered(name: str) -> None:
    torch.manual_seed(0)
    report = verify_parity(Uses(SHARDED[name]), (torch.randn(2, 4, 13, 6, dtype=DOUBLE),), ranks=3)
    assert report.exact, report
    assert not report.gathered


FIELD = torch.randn(2, 4, 13, 6, generator=DRAW, dtype=DOUBLE)
LAST = torch.zeros(2, 13, 6, dtype=torch.long)
LAST[1, 12, 5] = 7


@pytest.mark.parametrize(
    ("func", "given", "axis"),
    [
        (F.cross_entropy, (FIELD, LAST), 2),
        (F.embedding, (LAST, torch.ones(5, 3, dtype=DOUBLE)), 1),
        (torch.gather, (FIELD[:, 0], 1, LAST + 8), 2),
        (torch.Tensor.index_add, (FIELD, 2, torch.tensor([13]), FIELD[:, :, :1]), 2),
    ],
)
def test_an_entry_out_of_range_is_torchs_error_on_every_rank(func, given, axis: int) -> None:
    """Though one rank alone has it."""
    leaves, structure = tree_flatten((given, {}))
    call = database.Call(func.__name__, func, leaves, structure)
    theirs = database.run_plain(call)
    assert isinstance(theirs.error, IndexError | RuntimeError)
    with thread_ranks(3) as world:
        assert database.verdict(world, call, 0, axis, theirs, 1e-9) == "exact"


def gathered_in_half_precision() -> list[str]:
    torch.manual_seed(0)
    manager = get_domain_parallel_manager()
    model = convert_to_domain_parallel(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 2)), manager)
    x = shard_tensor(torch.randn(1, 3, 13, 8), -2, manager)
    with torch.autocast("cpu", torch.bfloat16), gathers_recorded() as gathers:
        model(x).float().sum().backward()
    return [gather.call for gather in gathers]


def test_autocast_gathers_nothing() -> None:
    """Its operands are of two types, which torch's word on tensors without values does not know of."""
    with thread_ranks(2) as world:
        assert world.run(gathered_in_half_precision) == [[], []]
