"""Recorded == eager, to the last bit: outputs, gradients, buffers, generators, bytes; or eager, with a reason."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from credit.domain_parallel import convert_to_domain_parallel, record, shard_tensor
from credit.domain_parallel.manager import DomainParallelManager
from credit.domain_parallel.root import Border
from credit.domain_parallel.slab import observed
from credit.models import DOMAIN_CONVERTERS
from credit.models.spectral_norm import normalize_weights
from credit.parallel.tensor_parallel import apply_tensor_parallel
from tests.domain_parallel import parity
from tests.domain_parallel.recordable import MODELS

STEPS = 4
"""Of an optimiser: the first two run eagerly, and the second records."""

Seen = list[Any]
"""What a step leaves: tensors, and what it has sent."""


def local(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def step_of(model: nn.Module, x: Tensor, rollout: int, amp: bool, traffic: Any) -> Seen:
    traffic.reset()
    x = x.clone().requires_grad_()
    y = x
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for _ in range(rollout):
            y = model(y)
    y.float().square().mean().backward()
    gradients = [torch.zeros(0) if p.grad is None else local(p.grad).clone() for p in model.parameters()]
    return [
        y.detach(),
        x.grad,
        *gradients,
        *(b.clone() for b in model.buffers()),
        torch.get_rng_state(),
        vars(traffic).copy(),
    ]


def steps_of(
    model: nn.Module,
    x: Tensor,
    traffic: Any,
    rollout: int = 1,
    amp: bool = False,
    change: Any = None,
    steps: int = STEPS,
) -> tuple[list[Seen], list[int]]:
    """What each step leaves, and how many torch functions met a slab in it."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found, calls = [], []
    for number in range(steps):
        torch.manual_seed(number)
        random.seed(number)
        if change is not None and number == steps - 1:
            change(model)
        optimizer.zero_grad()
        met: list[Any] = []
        with observed(met.append):
            found.append(step_of(model, x, rollout, amp, traffic))
        calls.append(len(met))
        optimizer.step()
    return found, calls


def are_same(a: Seen, b: Seen) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def recorded_and_eager(
    build: Callable[[], nn.Module], shape: tuple[int, ...], mesh: bool = False, **how: Any
) -> tuple[list[bool], list[int], list[str]]:
    """By step: whether it left the same, and how many torch functions met a slab; and what was said."""
    manager, grid = parity.manager(), None
    if mesh:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "domain"))
        manager = DomainParallelManager.from_mesh(grid)
    torch.manual_seed(0)
    plain = build()
    for parameter in plain.parameters():
        if not parameter.any():  # heads that start at zero
            nn.init.normal_(parameter, std=0.02)
    x = shard_tensor(torch.randn(shape), -2, manager)
    models = [copy.deepcopy(plain) for _ in range(2)]
    if grid is not None:
        models = [apply_tensor_parallel(model, grid["tp"]) for model in models]
    models = [convert_to_domain_parallel(m, manager, custom_converters=DOMAIN_CONVERTERS) for m in models]
    record(models[1])
    said = _Said()
    logging.getLogger("credit.domain_parallel.recorded").addHandler(said)
    (wanted, _), (found, calls) = (steps_of(model, x, manager.traffic, **how) for model in models)
    logging.getLogger("credit.domain_parallel.recorded").removeHandler(said)
    return [are_same(a, b) for a, b in zip(wanted, found, strict=True)], calls, said.lines


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines.append(entry.getMessage())


def check(results: list[tuple[list[bool], list[int], list[str]]]) -> None:
    for same, calls, said in results:
        assert said == []
        assert all(same), same
        assert calls[0]
        assert not any(calls[2:]), "rules ran in a step that was recorded"


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_package(worlds, name: str) -> None:
    check(worlds(2).run(recorded_and_eager, *MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"amp": True}, {"rollout": 2}, {"amp": True, "rollout": 2}], ids=str)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_every_mesh(worlds, name: str, size: int, how: dict) -> None:
    check(worlds(size).run(recorded_and_eager, *MODELS[name], **how))


def test_cut_by_channel_and_by_rows(worlds) -> None:
    check(worlds(4).run(recorded_and_eager, *MODELS["wxformer"], mesh=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"amp": True}, {"rollout": 2}], ids=str)
@pytest.mark.parametrize("name", ["diffusion", "wxformer", "pangu"])
def test_every_model_cut_by_channel_and_by_rows(worlds, name: str, how: dict) -> None:
    check(worlds(4).run(recorded_and_eager, *MODELS[name], mesh=True, **how))


class Net(nn.Module):
    """All that a recording has to get right, in a few layers.

    Args:
        then: what becomes of the activations, besides.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        norm: type[nn.Module] | None = None,
        spectral: bool = False,
        again: bool = False,
        then: Callable[[Net, Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4) if norm is None else norm(4)
        self.dropout, self.again, self.then = nn.Dropout(dropout), again, then
        self.scale, self.loose = 1.0, torch.full((4, 1, 1), 1.5)
        if spectral:
            normalize_weights(self)

    def block(self, x: Tensor) -> Tensor:
        return self.dropout(F.gelu(self.norm(self.twice(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        y = y if self.then is None else self.then(self, y)
        return x * self.scale + self.last(self.twice(y))


def busy(net: Net, y: Tensor) -> Tensor:
    """Draws, and changes in place, that could be done while rows are under way, but for what comes before them."""
    far, kept = y.roll(3, -2), y * 1
    noisy = F.dropout(far, 0.5) + kept
    kept.mul_(2)
    return noisy + F.dropout(kept, 0.5)


CASES: dict[str, tuple[dict, dict]] = {
    "dropout": ({"dropout": 0.3}, {"rollout": 2}),
    "running statistics": ({"norm": nn.BatchNorm2d}, {}),
    # Weights that are used several times, in each of two forwards: their gradients are added up in one order.
    "a rollout of weights that are computed": ({"spectral": True}, {"rollout": 2}),
    "autocast over a rollout": ({"spectral": True}, {"rollout": 2, "amp": True}),
    "what is computed again": ({"again": True}, {}),
    "order while messages fly": ({"then": busy}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded(threads, name: str) -> None:
    kwargs, how = CASES[name]
    check(threads(3).run(recorded_and_eager, lambda: Net(**kwargs), (2, 3, 17, 8), **how))


def halve(net: Net, y: Tensor) -> Tensor:
    net.first.bias.data = net.first.bias.data / 2
    return y


def count(net: Net, y: Tensor) -> Tensor:
    net.scale += 0.5
    return y


def remember(net: Net, y: Tensor) -> Tensor:
    net.__dict__.setdefault("seen", []).append(y.shape)
    return y


def seed(net: Net, y: Tensor) -> Tensor:
    torch.manual_seed(5)
    return y + torch.rand_like(y)


EAGER: dict[str, tuple[dict, str]] = {
    "values": ({"then": lambda net, y: y if float(y.detach().sum()) > 0 else -y}, "depends on values"),
    "loose tensor": ({"then": lambda net, y: y * net.loose}, "no input, parameter or buffer"),
    "data": ({"then": halve}, "assigns to the `data`"),
    "attribute": ({"then": count}, "another 'scale'"),
    "list": ({"then": remember}, "has another 'seen'"),
    "seed": ({"then": seed}, "seeds a random generator"),
    "python": ({"then": lambda net, y: y * random.random()}, "random numbers from Python"),
    "dropout again": ({"again": True, "dropout": 0.3}, "draws random numbers (a checkpoint"),
    "statistics again": ({"again": True, "norm": nn.BatchNorm2d}, "changes a buffer (a checkpoint"),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_recorded_runs_eagerly_and_says_why(threads, name: str) -> None:
    kwargs, reason = EAGER[name]
    for same, calls, said in threads(2).run(recorded_and_eager, lambda: Net(**kwargs), (1, 3, 13, 4)):
        assert all(same), same
        assert all(calls)
        assert said
        assert all(reason in line and line.startswith("Net is not recorded and runs eagerly: ") for line in said), said


CHANGES: dict[str, Callable[[Net], object]] = {
    "number": lambda net: setattr(net, "scale", 2.0),
    "probability": lambda net: setattr(net.dropout, "p", 0.6),
    "part in another mode": lambda net: net.dropout.eval(),
    "mode": lambda net: net.eval(),
    "frozen": lambda net: net.first.weight.requires_grad_(False),
    "another part": lambda net: setattr(net, "last", nn.Conv2d(4, 3, 1)),
    "another function": lambda net: setattr(net, "then", lambda net, y: y * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_module_is_noticed(threads, name: str) -> None:
    def changed(net: Net) -> None:
        torch.manual_seed(7)
        CHANGES[name](net)
        for parameter in net.parameters():
            parameter.grad = None

    build = lambda: Net(dropout=0.3)  # noqa: E731
    for same, calls, said in threads(2).run(recorded_and_eager, build, (1, 3, 13, 4), change=changed):
        assert all(same), same
        assert not calls[2]
        assert calls[3]
        assert said == []


def test_a_hook_is_called(threads) -> None:
    def hooked(net: Net) -> None:
        net.norm.register_forward_hook(lambda module, args, output: output * 2)

    for same, calls, said in threads(2).run(recorded_and_eager, Net, (1, 3, 13, 4), change=hooked):
        assert all(same), same
        assert calls[3]
        assert all("norm has a hook" in line for line in said)


def models_of(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """An eager model, one that is recorded, and this rank's rows."""
    manager = parity.manager()
    torch.manual_seed(0)
    plain = build()
    models = [convert_to_domain_parallel(copy.deepcopy(plain), manager) for _ in range(2)]
    x = shard_tensor(torch.randn(2, 3, 13, 4), -2, manager)
    for _ in range(2):
        record(models[1])(x) if models[1].__dict__["_domain_border"].recorder is None else models[1](x)
    return models[0], models[1], x


def of_odd_cotangents() -> list[bool]:
    eager, recorded, x = models_of(Net)
    losses = [
        lambda y: y.sum(),
        lambda y: y.mean((0, 1)).square().sum(),
        lambda y: (y.transpose(1, 3) * torch.arange(3.0)).square().sum(),
        lambda y: y.to(memory_format=torch.channels_last).square().sum(),
        lambda y: y[:, 1:].square().sum(),
    ]
    same = []
    for loss in losses:
        for amp in (False, True):  # in the backward alone
            values = [loss(model(x)) for model in (eager, recorded)]
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                a, b = (
                    torch.autograd.grad(y, [*m.parameters()]) for y, m in zip(values, (eager, recorded), strict=True)
                )
            same.append(are_same([*a], [*b]))
    return same


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).transpose(0, 1)


def of_changed_output() -> bool:
    eager, recorded, x = models_of(Turned)
    found = []
    for model in (eager, recorded):
        y = model(x)
        y.mul_(2)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
    return are_same(*found)


def test_an_output_may_be_changed_in_place(threads) -> None:
    assert threads(2).run(of_changed_output) == [True] * 2


def test_gradients_are_taken_as_they_are_stored(threads) -> None:
    for same in threads(2).run(of_odd_cotangents):
        assert all(same), same


class Ends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh().transpose(0, 1).transpose(0, 1)  # a view of what the backward needs


def of_misuse() -> list[str]:
    """What is said to changes in place of what the backward needs, to a second backward, and to a second derivative."""
    said = []
    for model in models_of(Ends)[:2]:
        x = shard_tensor(torch.randn(2, 3, 13, 4), -2, parity.manager()).requires_grad_()

        def changed(model: nn.Module, x: Tensor) -> None:
            y = model(x)
            y.mul_(2)
            y.sum().backward()

        def twice(model: nn.Module, x: Tensor) -> None:
            y = model(x).sum()
            y.backward()
            y.backward()

        def derived(model: nn.Module, x: Tensor) -> None:
            (first,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
            first.sum().backward()

        for misuse in (changed, twice, derived):
            try:
                misuse(model, x)
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
    return said


def test_misuse_is_refused_as_eagerly(threads) -> None:
    for changed, twice, _, *recorded in threads(2).run(of_misuse):
        assert "modified by an inplace operation" in changed
        assert "modified by an inplace operation" in recorded[0]
        assert "backward through the graph a second time" in twice
        assert "backward through the graph a second time" in recorded[1]
        assert "create_graph=True" in recorded[2]


def of_two_minds() -> bool:
    """Rank 0 replays, and the others run eagerly."""
    eager, recorded, x = models_of(Net)
    enter = Border._enter

    def always_ready(self: Border, *args: Any) -> Any:
        leaves, differing, _ = enter(self, *args)
        return leaves, differing, self.recorder is not None

    met: list[Any] = []
    model = recorded if parity.manager().domain_rank == 0 else copy.deepcopy(eager)
    try:
        Border._enter = always_ready  # type: ignore[method-assign]
        with observed(met.append):
            found = model(x)
    finally:
        Border._enter = enter  # type: ignore[method-assign]
    assert bool(met) == (parity.manager().domain_rank != 0)
    grads = torch.autograd.grad(found.square().sum(), [*model.parameters()])
    y = eager(x)
    return are_same([found, *grads], [y, *torch.autograd.grad(y.square().sum(), [*eager.parameters()])])


@pytest.mark.parametrize("ranks", ["threads", "worlds"])
def test_ranks_of_two_minds_understand_each_other(request, ranks: str) -> None:
    assert request.getfixturevalue(ranks)(3).run(of_two_minds) == [True] * 3


def of_modes() -> list[bool]:
    """Whether rules ran, in training and in validation by turns."""
    eager, recorded, x = models_of(Net)
    ran = []
    for _ in range(4):
        for training in (True, False):
            met: list[Any] = []
            with observed(met.append), torch.set_grad_enabled(training):
                found = recorded.train(training)(x)
            ran.append(bool(met))
            assert torch.equal(found, eager.train(training)(x))
    return ran


def test_training_and_validation_are_recorded_each(threads) -> None:
    assert threads(2).run(of_modes) == [[False, True, False, True, *[False] * 4]] * 2


def copies_replay() -> list[bool]:
    """Of a copy, whether it has recordings before its second call, and whether rules ran in its third."""
    _, recorded, x = models_of(Net)
    found = []
    for model in (copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))):
        model(x)
        for _ in range(2):
            met: list[Any] = []
            with observed(met.append):
                y = model(x)
            found.append(bool(met))
        found.append(torch.equal(y, recorded(x)))
    return found


def test_copies_record_anew(threads) -> None:
    assert threads(2).run(copies_replay) == [[True, False, True] * 2] * 2


def of_lengths() -> bool:
    """Heights of which a rank has as many rows in each."""
    eager, recorded, _ = models_of(Net)
    same = []
    for height in (10, 12, 11) * 3:
        x = shard_tensor(torch.randn(2, 3, height, 4), -2, parity.manager())
        same.append(torch.equal(eager(x), recorded(x)))
    return all(same)


def test_heights_that_leave_a_rank_as_many_rows(threads) -> None:
    assert threads(3).run(of_lengths) == [True] * 3


def compiled_departures(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[float]:
    manager = parity.manager()
    torch.manual_seed(0)
    plain = build().double()
    models = [
        convert_to_domain_parallel(copy.deepcopy(plain), manager, custom_converters=DOMAIN_CONVERTERS) for _ in "ab"
    ]
    record(models[1], compiled=True)
    x = shard_tensor(torch.randn(shape, dtype=torch.float64), -2, manager)
    found = []
    for _ in range(3):
        results = []
        for model in models:
            torch.manual_seed(3)
            y = model(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()], allow_unused=True)])
        found += [parity.relative(b, a) for a, b in zip(*results, strict=True) if a is not None]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*MODELS, "net"])
def test_compiled_is_eager_to_rounding(worlds, name: str) -> None:
    build, shape = MODELS.get(name, (drawing_net, (2, 3, 13, 4)))
    for found in worlds(2).run(compiled_departures, build, shape, timeout=1500):
        assert max(found) < 1e-9, found


def drawing_net() -> nn.Module:
    return Net(dropout=0.3, norm=nn.BatchNorm2d)
