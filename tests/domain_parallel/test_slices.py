"""One device, many slices: the plain model's numbers, the bits of as many processes, and a fraction of the memory."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel, shard_tensor, slices
from credit.domain_parallel.parking import File, Parking
from credit.domain_parallel.partition import PartitionError
from credit.models import DOMAIN_CONVERTERS
from credit.models.unet import UNet
from credit.parallel.meters import Meter
from tests.domain_parallel import parity
from tests.domain_parallel.operators import OPERATORS, C, W
from tests.models.kinds import FIELDS, filled, pangu, unet_diffusion, wxformer


class Checked(Parking):
    """Moves the smallest storage too, and holds its count against the storages themselves."""

    def __init__(self) -> None:
        super().__init__(File(), least=1)

    def park(self) -> None:
        assert self.now == sum(storage.nbytes() for storage, size in self._known.items() if size)
        super().park()


def numbers(model: nn.Module, x: Tensor, cotangent: Callable[[Tensor], Tensor] = torch.sin) -> dict[str, Tensor]:
    """What a forward and a backward give, and leave in buffers."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    y.backward(cotangent(y.detach()))
    found = {"output": y.detach(), "input": x.grad, "drawn": torch.rand(())}
    found |= {name: parity.gradient(p).clone() for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    return found


def wrong(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Errors that are not below 1e-9; a gradient that is rounding counts as 1e-4 of the largest."""
    assert ours.keys() == theirs.keys()
    sizes = {name: float(x.double().abs().max()) for name, x in theirs.items()}
    floor = 1e-4 * max(sizes.values())
    off = {
        name: float((ours[name].double() - x.double()).abs().max()) / max(sizes[name], floor)
        for name, x in theirs.items()
    }
    return {name: error for name, error in off.items() if not error < 1e-9}


# == the plain model


class Stem(nn.Module):
    """With what a forward changes or draws: running means, spectral norm's vectors, dropout, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 5, padding=2, stride=2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.3, self.training)) * self.calls


def unet() -> nn.Module:
    return UNet(3, 3, (19, 16), width=8)


MODELS = {
    "unet": (unet, (3, 19, 16)),
    "stem": (Stem, (3, 19, 16)),
    "wxformer": (wxformer, None),
    "unet_diffusion": (unet_diffusion, None),
    "pangu": (pangu, None),
}


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("name", MODELS)
def test_slices_give_what_the_plain_model_gives(name: str, number: int) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = filled(build()).double()
    x = torch.randn(2, *(shape or (FIELDS[0], *FIELDS[2])), dtype=torch.float64)
    other = copy.deepcopy(model)
    expected = numbers(model, x)
    with slices(other, number, custom_converters=DOMAIN_CONVERTERS, parking=Checked()) as parking:
        found = numbers(other, x)
    assert wrong(found, expected) == {}
    assert {k: v for k, v in vars(other).items() if isinstance(v, int)} == {
        k: v for k, v in vars(model).items() if isinstance(v, int)
    }
    assert parking.peak_parked > 0
    del found
    other.zero_grad()
    assert (parking.now, parking.parked) == (0, 0)
    assert wrong(numbers(other, x), numbers(model, x)) == {}  # it is the plain model again


def test_a_part_that_draws_is_not_refused_and_numbers_do_not_depend_on_what_is_parked() -> None:
    model, x = Stem(), torch.randn(2, 3, 19, 16)
    found = []
    for least in (1, 1 << 40):
        with slices(other := copy.deepcopy(model), 3, parking=Parking(File(), least)):
            found.append(numbers(other, x))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Structured(nn.Module):
    """Gives a field, what is whole, what has no gradient, and what is no tensor; takes what is whole, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, *, scale: Tensor, flag: None = None) -> dict[str, Any]:
        y = self.conv(x) * scale
        return {"rows": y, "whole": [y.mean((2, 3)), 3, "word"], "fixed": y.detach().argmax(1, keepdim=True)}


def test_whatever_holds_tensors_goes_in_and_comes_out() -> None:
    torch.manual_seed(0)
    model = Structured().double()

    def run() -> tuple[Any, list[Tensor | None]]:
        x = torch.linspace(-1, 1, 3 * 11 * 5, dtype=torch.float64).view(1, 3, 11, 5).requires_grad_()
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        y = model(x, scale=scale, flag=None)
        loss = y["rows"].square().sum() + y["whole"][0].sin().sum()
        return y, [*torch.autograd.grad(loss, [x, scale, *model.parameters()])]

    expected, theirs = run()
    with slices(model, 4, parking=Checked()):
        found, ours = run()
    assert found["whole"][1:] == [3, "word"]
    assert not found["fixed"].requires_grad
    assert torch.equal(found["fixed"], expected["fixed"])
    pairs = [
        (found["rows"], expected["rows"]),
        (found["whole"][0], expected["whole"][0]),
        *zip(ours, theirs, strict=True),
    ]
    assert all(parity.relative(a, b) < 1e-9 for a, b in pairs)


def test_a_rollout_and_a_gradient_of_the_input_alone() -> None:
    torch.manual_seed(0)
    model = Stem().double().eval().requires_grad_(False)
    x = torch.randn(1, 3, 24, 16, dtype=torch.float64, requires_grad=True)

    def gradient() -> Tensor:
        model.calls = 0
        y = nn.functional.interpolate(model(x), scale_factor=2)
        return torch.autograd.grad(model(x + y).square().sum(), x)[0]

    expected = gradient()
    with slices(model, 3, parking=Checked()):
        assert parity.relative(gradient(), expected) < 1e-9
        with torch.no_grad():
            assert not model(x).requires_grad


def test_autocast_is_the_callers() -> None:
    torch.manual_seed(0)
    model, x = Structured(), torch.randn(1, 3, 11, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, scale=torch.ones(()))["rows"]
        with slices(model, 3):
            found = model(x, scale=torch.ones(()))["rows"]
    assert found.dtype == expected.dtype == model.conv(x).to(torch.bfloat16).dtype
    assert parity.relative(found.float(), expected.float()) < 1e-2


# The bits of processes


def of_processes(names: list[str], height: int) -> dict[str, list[bytes]]:
    """Of ranks: output, gradient of the input and sums of those of the parameters, in the order of ranks."""
    group, found = parity.manager().group, {}
    for name in names:
        case = parity.expected(OPERATORS[name], (2, C, height, W), torch.float64)
        model = convert_to_domain_parallel(case.model(), parity.manager())
        x = shard_tensor(case.x, -2, parity.manager()).requires_grad_()
        torch.manual_seed(1)
        y = model(x)
        y.backward(parity.rows_of(case.cotangent, -2))
        totals = [sum(group.all_gather(parity.gradient(p)).unbind()) for p in model.parameters()]
        found[name] = [t.detach().contiguous().numpy().tobytes() for t in (y, x.grad, *totals)]
    return found


def on_slices(names: list[str], height: int, number: int) -> list[dict[str, list[bytes]]]:
    """The same, cut as for ranks."""
    from credit.domain_parallel.partition import Partition

    found: list[dict[str, list[bytes]]] = [{} for _ in range(number)]
    for name in names:
        case = parity.expected(OPERATORS[name], (2, C, height, W), torch.float64)
        x, model = case.x.clone().requires_grad_(), case.model()
        torch.manual_seed(1)
        with slices(model, number, parking=Checked()):
            y = model(x)
            y.backward(case.cotangent)
        for rank in range(number):
            parts = []
            for t in (y.detach(), x.grad):
                cut = t.shape[-2] >= number
                rows = Partition(t.shape[-2], number).range(rank) if cut else range(t.shape[-2])
                parts.append(t[..., rows.start : rows.stop, :])
            parts += [parity.gradient(p) for p in model.parameters()]
            found[rank][name] = [t.contiguous().numpy().tobytes() for t in parts]
    return found


def fitting(height: int) -> list[str]:
    found = []
    for name in OPERATORS:
        try:
            copy.deepcopy(parity.expected(OPERATORS[name], (2, C, height, W), torch.float64).model())
        except (RuntimeError, ValueError, IndexError):  # torch refuses it; the old weight_norm has no copies
            continue
        found.append(name)
    return found


def test_slices_give_the_bits_of_processes(worlds) -> None:
    names = fitting(17)[::5]
    theirs = worlds(3).run(of_processes, names, 17)
    ours = on_slices(names, 17, 3)
    for rank in range(3):
        assert {name for name in names if ours[rank][name] != theirs[rank][name]} == set()


# Memory


@pytest.mark.parametrize("is_training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eight_slices_of_a_unet_take_less_than_a_third_of_its_memory(is_training: bool) -> None:
    """At 361 x 720, parameters and input included: 0.23, and 0.05 in training. Counted on tensors without values."""
    with torch.device("meta"):
        model, x = UNet(20, 20, (361, 720)), torch.empty(1, 20, 361, 720)
    meter = Meter()
    meter.ignore([*model.parameters(), x])
    kept = sum(t.nbytes for t in (x, *model.parameters()))

    def step() -> None:
        y = model(x)
        if is_training:
            y.square().mean().backward()
            model.zero_grad()

    with torch.set_grad_enabled(is_training):
        with meter:
            step()
        with slices(model, 8) as parking:
            step()
    assert (kept + parking.peak) / (kept + meter.peak) < 0.30


def test_what_is_counted_without_values_is_what_is_there() -> None:
    torch.manual_seed(0)
    model, x = UNet(4, 4, (45, 96)), torch.randn(1, 4, 45, 96)
    peaks = []
    for kind in ("cpu", "meta"):
        with slices(model.to(kind), 3) as parking:
            y = model(x.to(kind))
            y.square().mean().backward()
        model.zero_grad()
        peaks.append((parking.peak, parking.peak_parked, parking.moved))
    assert peaks[0] == peaks[1]


def test_what_is_saved_for_a_backward_rests_elsewhere() -> None:
    torch.manual_seed(0)
    model, x = Stem(), torch.randn(2, 3, 19, 16)
    with slices(model, 4, parking=Checked()) as parking:
        y = model(x)
        assert parking.now == y.nbytes
        assert parking.parked > 4 * y.nbytes
        y.sum().backward()


class Addresses(nn.Module):
    """Hands the memory of what it makes to numpy, before rows are exchanged and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made, later = torch.arange(1000.0).sqrt(), torch.arange(1000.0).cos()
        seen = made.numpy()
        x = self.conv(self.conv(x)) * float(seen.sum())
        return x * float(later.numpy().sum()) * later.tolist()[7]


def test_memory_whose_address_is_known_stays() -> None:
    torch.manual_seed(0)
    model, x = Addresses(), torch.randn(1, 1, 12, 6)
    with torch.no_grad():
        expected = model(x)
        with slices(model, 3, parking=Parking(File(), least=1)):
            assert parity.relative(model(x), expected) < 1e-5


# Refusals


class Remembering(nn.Module):
    """Adds what it made last, a field, and the means of that."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv, self.where, self.last, self.means = nn.Conv2d(3, 3, 3, padding=1), where, None, None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x))
        if isinstance(self.last, Tensor):
            y = y + self.last.flip(-1) * self.means
        kept = y if self.where == "graph" else y.detach()
        self.last, self.means = [kept] if self.where == "list" else kept, y.detach().mean((2, 3), keepdim=True)
        return y


def test_what_a_forward_keeps_is_there_at_the_next() -> None:
    x, model = torch.randn(2, 3, 7, 8, dtype=torch.float64), Remembering("attribute").double()
    on_slices = copy.deepcopy(model)
    wanted = [model(x) for _ in range(3)]
    with slices(on_slices, 3):
        found = [on_slices(x) for _ in range(3)]
    assert on_slices.last.shape == (2, 3, 7, 8)
    torch.testing.assert_close([*found, on_slices.last], [*wanted, model.last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("where", "words"), [("list", "last: the forward kept a field there"), ("graph", "detach it")])
def test_what_a_forward_keeps_and_slices_cannot_is_refused(where: str, words: str) -> None:
    with slices(model := Remembering(where), 2), pytest.raises(DomainParallelError, match=words):
        model(torch.randn(1, 3, 4, 8))


def test_a_model_on_slices_is_not_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    for of in (model, model[0]):
        with slices(of, 2), pytest.raises(DomainParallelError, match="is on slices: save its state_dict"):
            copy.deepcopy(model)
        with slices(of, 2), pytest.raises(DomainParallelError, match="is on slices: save its state_dict"):
            torch.save(model, io.BytesIO())
    with slices(model[0], 2), slices(model, 2), pytest.raises(DomainParallelError, match="Conv2d is on slices"):
        model(torch.randn(1, 3, 4, 8))
    copy.deepcopy(model)


class Changing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_what_slices_cannot_do_is_refused() -> None:
    x = torch.randn(1, 3, 4, 8)
    model = nn.Conv2d(3, 3, 3, padding=1)
    with slices(model, 2):
        with pytest.raises(DomainParallelError, match="sliced, already"), slices(model, 2):
            pass
        y = model(x)
        y.sum().backward()
        with pytest.raises(DomainParallelError, match="a second backward"):
            y.sum().backward()
    with slices(model, 5), pytest.raises(PartitionError, match="cannot cut 4 rows into 5 slices"):
        model(x)
    with slices(changing := Changing(), 2), pytest.raises(DomainParallelError, match="Changing changes in place"):
        changing(x)
    with slices(model, 1) as parking:
        model(x)
    assert parking.peak == 0
    for number in (0, 2.5, "2"):
        with pytest.raises(ValueError, match="one slice at least"), slices(model, number):  # type: ignore[arg-type]
            pass


class Full(File):
    def put(self, storage: Any) -> int:
        raise OSError("no space left")


def test_a_full_disk_is_an_error_and_no_wait() -> None:
    model = Stem()
    with slices(model, 3, parking=Parking(Full(), least=1)), pytest.raises(OSError, match="no space left"):
        model(torch.randn(1, 3, 12, 8))
