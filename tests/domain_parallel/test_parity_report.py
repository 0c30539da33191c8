"""verify_parity says exact where it is, and names the module where it is not."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit.domain_parallel import (
    DomainParallelError,
    DomainParallelPeriodicConv2d,
    ParityReport,
    convert_to_domain_parallel,
    slab,
    verify_parity,
)
from credit.domain_parallel.slab import Slab
from credit.domain_parallel.thread_ranks import RankError
from credit.models.unet_diffusion import PeriodicConv2d
from tests.domain_parallel import parity


class Smooth(nn.Module):
    """Mixes rows, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")
        self.register_buffer("met", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class OwnRowsOnly(Smooth):
    """The mistake: a halo of this rank's own edge."""

    def forward(self, x: Tensor | Slab) -> Tensor:
        return x.like(self.conv(x.local)) if isinstance(x, Slab) else self.conv(x)


class WrongBackward(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + (0.5 * (y - y.detach()) if isinstance(x, Slab) else 0)


class WrongBuffer(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        self.met += 2 if isinstance(x, Slab) else 1
        return self.conv(x)


class GivesNaN(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        # On one rank alone, in one point.
        return x.like(y.local + (float("nan") if x.group.rank else 0)) if isinstance(x, Slab) else y


class OtherNames(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(1))


class OtherShape(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.pad(y, (0, 0, 0, 2)) if isinstance(x, Slab) else y


def made_into(kind: type[Smooth]):
    """A custom converter that turns a Smooth into `kind`, with its weights."""

    def convert(module: nn.Module) -> nn.Module:
        made = kind()
        made.load_state_dict(module.state_dict(), strict=False)
        return made.to(next(module.parameters()).dtype)

    return convert


@dataclass
class Answer:
    field: Tensor
    mean: Tensor


class Net(nn.Module):
    """A convolution, a norm with statistics, dropout, a time that shifts all, and a head that starts as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.embed = nn.Linear(5, 4)
        self.blocks = nn.Sequential(PeriodicConv2d(4, 4), Smooth(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
        self.head = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, time: Tensor, *, scale: Tensor) -> Answer:
        y = self.drop(self.norm(self.stem(x.mul_(2)))) + self.embed(time)[:, :, None, None]
        y = self.head(self.blocks(y.mul_(2) * scale))
        return Answer(y, y.mean((1, 2, 3)))


def reported(kind: type[Smooth] = Smooth, height: int = 13, **options) -> ParityReport:
    torch.manual_seed(3)
    converters = {PeriodicConv2d: DomainParallelPeriodicConv2d}
    if kind is not Smooth:
        converters[Smooth] = made_into(kind)
    given = (torch.randn(2, 3, height, 6), torch.randn(2, 5))
    scale = {"scale": torch.rand(1)}
    return verify_parity(Net(), given, parity.manager(), kwargs=scale, custom_converters=converters, **options)


def alike(reports: list[ParityReport]) -> ParityReport:
    """The report, after checking that all ranks have the same."""
    assert all(report.errors == reports[0].errors and report.first == reports[0].first for report in reports)
    return reports[0]


@pytest.mark.parametrize("size", [2, 3])
def test_an_exact_model(threads, size) -> None:
    report = alike(threads(size).run(reported))
    assert report.exact, str(report)
    assert report.first is None
    names = dict(Net().named_parameters())
    assert report.errors.keys() == {
        *("output 0", "output 1"),
        *("input gradient 0", "input gradient 1", "input gradient 2"),
        *(f"parameter gradient {name}" for name in names),
        *(f"buffer {name}" for name, _ in Net().named_buffers()),
    }
    assert "buffer norm.running_var" in report.errors
    assert report.calls["torch.nn.functional.conv_transpose2d"] == 1
    assert report.calls["torch.nn.functional.dropout"] == 1
    text = str(report)
    assert f"over {size} domain ranks, torch.float64: exact to 1e-09" in text
    assert f"parameter gradient        {len(names)}" in text.splitlines()[4]


def test_a_module_that_takes_its_rows_for_all_is_named(threads) -> None:
    report = alike(threads(2).run(reported, OwnRowsOnly))
    assert not report.exact
    assert report.first == "blocks.1"
    assert report.first_error > 1e-3
    assert report.errors["output 0"] > 1e-3
    text = str(report)
    assert "NOT exact" in text
    assert f"They part first at blocks.1, whose output is off by {report.first_error:.1e}" in text
    assert "custom converter" in text


@pytest.mark.parametrize(
    ("kind", "wrong", "first", "last"),
    [
        (WrongBackward, {"input gradient", "parameter gradient"}, None, "parameter gradient blocks.1.conv.bias. Look"),
        (WrongBuffer, {"buffer"}, None, "buffer blocks.1.met. Look"),
        (OtherNames, {"parameter gradient"}, None, "parameter gradient blocks.1.extra. Look"),
        (GivesNaN, {"output"}, "blocks.1", None),
        (OtherShape, {"output"}, "blocks.1", None),
    ],
)
def test_every_kind_of_difference_is_seen(threads, kind, wrong, first, last) -> None:
    report = alike(threads(2).run(reported, kind))
    assert {key.rsplit(" ", 1)[0] for key, error in report.errors.items() if error > 1e-9} == wrong
    assert report.first == first
    assert ("They part first at blocks.1" if first else last) in str(report)


def reported_float32(tolerance: float) -> ParityReport:
    return reported(dtype=torch.float32, tolerance=tolerance)


def test_rounding_is_called_rounding(threads) -> None:
    assert threads(2).run(reported_float32, 1e-4)[0].exact
    report = alike(threads(2).run(reported_float32, 1e-9))
    assert not report.exact
    assert "rounding in a narrower type" in str(report)


class Biased(nn.Module):
    """The gradient of this bias is zero but for rounding, which differs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def biased() -> ParityReport:
    torch.manual_seed(0)
    return verify_parity(Biased(), (torch.randn(2, 2, 17, 8),), parity.manager())


def test_a_gradient_that_vanishes_is_no_error(threads) -> None:
    assert alike(threads(3).run(biased)).exact


def what_it_leaves() -> tuple[bool, ...]:
    torch.manual_seed(0)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    given = (torch.randn(2, 3, 13, 6), torch.randn(2, 5))
    stands = torch.get_rng_state()
    verify_parity(model, given, parity.manager(), kwargs={"scale": torch.ones(1)})
    after = model.state_dict()
    return (
        all(torch.equal(before[name], after[name]) for name in before),
        type(model) is Net and type(model.stem) is nn.Conv2d,
        not any(parameter.grad is not None for parameter in model.parameters()),
        not any(x.requires_grad for x in given),
        torch.equal(torch.get_rng_state(), stands),
        slab._state.observer is None,
    )


def test_the_model_its_inputs_and_the_generator_are_left_alone(threads) -> None:
    assert all(all(facts) for facts in threads(2).run(what_it_leaves))


def differing(what: str) -> None:
    rank = parity.manager().domain_rank
    torch.manual_seed(rank if what == "weights" else 0)
    model = Net()
    if what == "modes":
        model.drop.train(rank == 0)
    torch.manual_seed(rank if what == "inputs" else 0)
    verify_parity(model, (torch.randn(2, 3, 13, 6), torch.randn(2, 5)), parity.manager())


@pytest.mark.parametrize(
    ("what", "message"),
    [("weights", "weights, buffers or modes"), ("modes", "weights, buffers or modes"), ("inputs", "example inputs")],
)
def test_what_differs_between_ranks_is_refused_on_all(threads, what, message) -> None:
    with pytest.raises(RankError, match=rf"Net: the {message} on domain ranks \[1\] differ") as caught:
        threads(2).run(differing, what)
    assert {type(error) for error in caught.value.errors.values()} == {DomainParallelError}
    assert len(caught.value.errors) == 2


class Numpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.conv(x).detach().numpy())


def refused() -> None:
    torch.manual_seed(0)
    verify_parity(Numpy(), (torch.randn(1, 2, 13, 6),), parity.manager())


def test_a_refusal_is_passed_on(threads) -> None:
    with pytest.raises(RankError, match="numpy cannot be done on a field cut over ranks") as caught:
        threads(2).run(refused)
    assert len(caught.value.errors) == 2
    assert threads(2).run(what_it_leaves)


def converted_already() -> None:
    verify_parity(convert_to_domain_parallel(Biased(), parity.manager()), (torch.randn(2, 2, 13, 6),), parity.manager())


def test_a_converted_model_is_refused(threads) -> None:
    with pytest.raises(RankError, match="takes the plain model") as caught:
        threads(2).run(converted_already)
    assert len(caught.value.errors) == 2


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Biased()
    model.kept = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(DomainParallelError, match="Biased: parity is checked on copies"):
        verify_parity(model, (torch.randn(2, 2, 5, 4),))


def test_one_rank_compares_plain_with_plain_and_says_so() -> None:
    report = verify_parity(Biased(), (torch.randn(2, 2, 5, 4),), ranks=1)
    assert report.exact
    assert report.calls == {}
    assert max(report.errors.values()) == 0
    assert "on one rank (nothing is cut: plain is plain)" in str(report)
