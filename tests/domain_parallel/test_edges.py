"""At the edges: spellings, storage, what crosses the border. Exact on two and three ranks, or refused in words."""

from __future__ import annotations

import dataclasses
import gc
import logging
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel, shard_tensor, verify_parity
from credit.domain_parallel.binding import bind
from credit.domain_parallel.slab import RULES, Declined, Slab, bound, register_rule
from credit.domain_parallel.storage import Memory
from credit.domain_parallel.thread_ranks import RankError
from tests.domain_parallel import parity
from tests.domain_parallel.operators import Call


def changed(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A function that changes a copy of its field in place, and gives it."""

    def call(x: Tensor) -> Tensor:
        x = x * 1
        read = change(x)
        return x + read if isinstance(read, Tensor) else x + 1

    return call


def added(x: Tensor) -> Tensor:
    x[:, :, 1:-1] += 1
    return x


def scaled(x: Tensor) -> None:
    x[:, :, 1:-1] *= 2


def row_before(x: Tensor) -> Tensor:
    row = x[:, :, 0].unsqueeze(2)
    x.mul_(2)
    return row


def slice_before(x: Tensor) -> Tensor:
    rows = x[:, :, 1:]
    x.add_(1)
    return rows.sum(2, keepdim=True)


def mask_set(x: Tensor) -> None:
    x[x > 0] = 0


def row_turned(x: Tensor) -> None:
    x[:, :, 3].transpose_(0, 1)[0] = 4


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "std(axis=)": lambda x: x / (x.std(axis=(2, 3), keepdim=True) + 1),
    "var(axis=)": lambda x: x / (torch.var(x, axis=-2, keepdim=True) + 1),
    "diff by position": lambda x: torch.diff(x, 1, -2).mean((1, 2, 3)),
    "diff prepend": lambda x: torch.diff(x, dim=-1, prepend=x[..., :1]),
    "stack(axis=)": lambda x: torch.stack([x, 2 * x], axis=1).mean(1),
    "concatenate(axis=)": lambda x: torch.concatenate([x, x.cos()], axis=1).mean(0),
    "softmax to another type": lambda x: x.softmax(-1, torch.float32),
    "fft(dim=0)": lambda x: torch.fft.fft(x.permute(2, 0, 1, 3), dim=0).abs().permute(1, 2, 0, 3),
    "conj": lambda x: torch.fft.fft(torch.fft.rfft(x).conj(), dim=-2).real,
    "flip(dims=)": lambda x: torch.flip(x, dims=(2,)),
    "input=": lambda x: torch.where(condition=x > 0, input=x, other=-x),
    "quantile": lambda x: x - torch.quantile(x, 0.5, dim=-1, keepdim=True),
    "cat(out=)": lambda x: x + torch.cat([x.detach(), x.detach()], 1, out=x.new_empty(0)).mean(),
    "std of a constant": lambda x: x + (x * 0).std((2, 3), keepdim=True),
    "batch_norm with a bias alone": lambda x: F.batch_norm(x, None, None, None, x.new_ones(4), training=True),
    "adaptive max pooling, ties": lambda x: F.adaptive_max_pool2d(x.clamp(max=0), 1) + x,
    "channels last, then dropout": lambda x: F.dropout(F.group_norm(x.to(memory_format=torch.channels_last), 2), 0.3),
    "few rows": lambda x: F.interpolate(x, size=(1, 3), mode="bilinear").sum() + x,
    "attention with dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "mask": lambda x: x + x[x > 0].sum(),
    "indices of pooling": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "into Python": lambda x: x * float(x.detach().sum().tanh()) if (x.detach().sum() > -1e9) else x,
    "svd": lambda x: torch.linalg.svd(x).S,
    "index_add": lambda x: x.index_add(2, torch.tensor([0, 5]), x[:, :, :2]),
    "slice added to": changed(added),
    "slice scaled": changed(scaled),
    "view of a slice": changed(lambda x: x[:, :, 1:-1][:, 0].mul_(2).mean()),
    "reshaped": changed(lambda x: x.reshape(2, 4, -1)[..., ::5].zero_().sum()),
    "unflattened": changed(lambda x: x[:, :, :12].unflatten(2, (3, 4))[:, :, 1].add_(1).mean()),
    "row read after": changed(row_before),
    "slice read after": changed(slice_before),
    "row changed by an overload": changed(lambda x: torch.ops.aten.mul_.Tensor(x.select(2, 3), 2).sum()),
    "row changed by its initializer": changed(lambda x: nn.init.constant_(x.data[:, :, 3], 4.0).sum()),
    "row changed in a list": changed(lambda x: torch._foreach_zero_([x.data[:, :, 3]])),
    "row transposed in place": changed(row_turned),
    "strides of a row": lambda x: x + x[:, :, 3].stride(0),
    "mask set": changed(mask_set),
    "slice cast to its own type": lambda x: x[:, :, 1:].double() * 2,
}


class Scaled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4).view(1, 4, 1, 1))
        self.call = Call(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(torch.tanh(x * self.scale) + 0.1 * x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_it_is_exact(name: str, ranks: int) -> None:
    torch.manual_seed(3)
    assert verify_parity(Scaled(EXACT[name]), (torch.randn(2, 4, 13, 6),), ranks=ranks).exact


def test_nearest_rows_are_those_of_float32() -> None:
    model = Scaled(lambda x: F.interpolate(x, size=(44, 9), mode="nearest"))
    x = torch.randn(1, 4, 46, 6)
    assert verify_parity(model, (x,), ranks=3, dtype=torch.float32, tolerance=1e-5).exact


def without_gradients() -> float:
    def call(x: Tensor) -> Tensor:
        nn.init.zeros_(x[:, :, 0])
        return x[:, :, 1:-1] + x[:, :, :-2]

    plain = Scaled(call).double()
    x = torch.randn(2, 4, 13, 6, dtype=torch.float64)
    sharded = convert_to_domain_parallel(Scaled(call).double(), parity.manager())
    with torch.inference_mode():
        y = sharded(shard_tensor(x, -2, parity.manager()))
        return parity.relative(y, parity.rows_of(plain(x), -2))


def test_inference_mode(threads) -> None:
    assert max(threads(2).run(without_gradients)) < 1e-12


class Remembering(nn.Module):
    """Buffers of fields and rows, set anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.zeros(13, 6))
        self.register_buffer("row", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x * (self.before + self.row)
        self.before, self.row = x.detach().mean((0, 1)), x.detach()[0, 0, 3]
        return y + self.before


def remembered() -> float:
    plain, sharded = Remembering().double(), convert_to_domain_parallel(Remembering().double(), parity.manager())
    for _ in range(2):
        x = torch.randn(2, 4, 13, 6, dtype=torch.float64)
        found, expected = sharded(shard_tensor(x, -2, parity.manager())), parity.rows_of(plain(x), -2)
    pairs = [(found, expected), *zip(sharded.state_dict().values(), plain.state_dict().values(), strict=True)]
    return max(parity.relative(a, b) for a, b in pairs)


def test_buffers_that_a_forward_sets_are_whole(threads) -> None:
    assert max(threads(3).run(remembered)) < 1e-12


@dataclasses.dataclass
class Batch:
    field: Tensor
    hour: float = 0.0


class Bag:
    def __init__(self, field: Tensor) -> None:
        self.field = field


class OfBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, batch: Any) -> Any:
        y = self.conv(batch.field)
        return type(batch)(y) if isinstance(batch, Batch) else types.SimpleNamespace(y=y)


@pytest.mark.parametrize("given", [Batch, lambda x: types.SimpleNamespace(field=x)], ids=["dataclass", "namespace"])
def test_a_batch_in_an_object_is_opened(given) -> None:
    assert verify_parity(OfBatch(), (given(torch.randn(2, 4, 13, 6)),), ranks=3).exact


class Keeps(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = y.square().mean()
        return y


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


def misused(what: str) -> None:
    manager, x = parity.manager(), torch.randn(2, 4, 13, 6)
    rows = shard_tensor(x, -2, manager)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()), nn.Conv2d(4, 4, 1))
    if what == "a part":
        convert_to_domain_parallel(net, manager)[0](rows)
    elif what == "no batch":
        convert_to_domain_parallel(net, manager)(rows[0])
    elif what == "an object":
        convert_to_domain_parallel(OfBatch(), manager)(Bag(rows))
    elif what == "kept":
        convert_to_domain_parallel(Keeps(nn.Conv2d(4, 4, 3, padding=1)), manager)(rows)
    elif what == "whole, but not the same":
        model = Call(lambda x, time: x + time)
        convert_to_domain_parallel(model, manager)(rows, torch.full((1,), float(manager.domain_rank)))
    elif what == "Python":
        random.seed(manager.domain_rank)
        convert_to_domain_parallel(Draws(), manager)(rows)
    elif what == "gathering":
        model = Call(lambda x: torch.linalg.svd(x).S)
        convert_to_domain_parallel(model, manager, fallback="refuse")(rows)


MISUSES = {
    "a part": "is a part of a converted model",
    "no batch": "got 0 fields",
    "an object": "OfBatch: a tensor inside of a .*Bag",
    "kept": r"\.aux: the forward kept a tensor with a gradient",
    "whole, but not the same": "were given different inputs",
    "Python": "generators of Python differ",
    "gathering": r"svd cannot be done .*no rule",
}


@pytest.mark.parametrize("what", MISUSES)
def test_it_is_refused_on_every_rank(threads, what: str) -> None:
    with pytest.raises(RankError, match=MISUSES[what]) as caught:
        threads(2).run(misused, what)
    assert {type(error) for error in caught.value.errors.values()} == {DomainParallelError}
    assert len(caught.value.errors) == 2


def test_what_is_gathered_is_listed() -> None:
    model = Scaled(lambda x: torch.linalg.svd(x).S)
    report = verify_parity(model, (torch.randn(2, 4, 13, 6),), ranks=2)
    (gathered,) = report.gathered
    assert all(text in gathered for text in ("svd", "call (Call)", "test_edges.py"))
    assert gathered in str(report)


def runs_twice() -> None:
    model = convert_to_domain_parallel(Scaled(lambda x: x + torch.kron(x[:1, :1, :1, :1], x)), parity.manager())
    for _ in range(2):
        model(shard_tensor(torch.randn(2, 4, 13, 6), -2, parity.manager()))


def test_a_gather_is_logged_once_by_the_first_rank(threads, caplog) -> None:
    with caplog.at_level(logging.WARNING, "credit"):
        threads(2).run(runs_twice)
    assert [record.levelname for record in caplog.records if "kron" in record.getMessage()] == ["WARNING"]


def test_rules_are_held_to_what_torch_declares() -> None:
    with pytest.raises(TypeError, match="takes axes, and torch declares"):
        bound(torch.flip, lambda input, axes: None, {})
    with pytest.raises(TypeError, match="takes kwargs"):
        bound(torch.flip, lambda input, **kwargs: None, {})
    with pytest.raises(TypeError, match="has two rules"):
        register_rule(torch.flip, RULES[torch.flip])


def test_an_argument_that_a_rule_does_not_take_is_not_dropped() -> None:
    x = torch.ones(2, 3)
    answer = bound(torch.cumsum, lambda input, dim: (input, dim), {})
    assert answer(x, axis=1) == (x, 1)
    assert answer(x, 1, dtype=None) == (x, 1)
    with pytest.raises(Declined):
        answer(x, 1, dtype=torch.float64)
    with pytest.raises(Declined):
        answer(x, 1, 2)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "names"),
    [
        (torch.std, (), {"axis": 1, "keepdims": True}, {"input", "dim", "keepdim"}),
        (torch.Tensor.std, (True,), {}, {"input", "unbiased"}),
        (torch.diff, (2,), {}, {"input", "n"}),
        (torch.softmax, (-1, torch.float32), {}, {"input", "dim", "dtype"}),
        (torch.Tensor.permute, (1, 0), {}, {"input", "dims"}),
        (torch.quantile, (0.5, 1, True), {}, {"input", "q", "dim", "keepdim"}),
        (torch.max, (torch.ones(2, 3),), {}, {"input", "other"}),
        (torch.nn.functional.max_pool2d, (2,), {"ceil_mode": True}, {"input", "kernel_size", "ceil_mode"}),
    ],
)
def test_calls_are_bound_as_torch_declares(func, args, kwargs, names) -> None:
    found = bind(func, (torch.ones(2, 3), *args), kwargs)
    assert found is not None
    assert set(found) == names


def left_over() -> int:
    model = convert_to_domain_parallel(Scaled(EXACT["slice scaled"]), parity.manager())
    x = shard_tensor(torch.randn(2, 4, 13, 6), -2, parity.manager())
    model(x).sum().backward()
    parity.manager().group.all_reduce(torch.zeros(1))  # all have ended theirs
    return alive()


def alive() -> int:
    return sum(isinstance(one, Slab | Memory) for one in gc.get_objects())


def test_nothing_of_a_step_waits_for_the_garbage_collector(threads) -> None:
    gc.collect()
    gc.disable()
    try:
        before = alive()  # of other tests
        assert threads(2).run(left_over) == [before, before]
    finally:
        gc.enable()
