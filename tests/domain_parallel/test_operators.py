"""Every operator at every height: sharded == plain in float64, output, input gradient and every parameter gradient."""

from __future__ import annotations

import traceback
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from credit.domain_parallel import DomainParallelError, convert_to_domain_parallel
from tests.domain_parallel import parity
from tests.domain_parallel.operators import LINES, OPERATORS, VOLUMES, C, W

TOLERANCE = 1e-9
HEIGHTS = (5, 12, 16, 17)


def plain_runs(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """False where torch itself refuses (a reflection wider than the field, windows that do not divide)."""
    try:
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = OPERATORS[name]().to(dtype)(x)
        y.sum().backward()
        return y.numel() > 0 or shape[0] == 0
    except (RuntimeError, ValueError, IndexError):
        return False


def failure(
    name: str,
    height: int,
    dim: int = -2,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
) -> str | None:
    """What is wrong with the operator at this height: the errors, or the traceback."""
    shape = (batch, C, height, W) if dim == -2 else (batch, C, 9, W)
    if not plain_runs(name, shape, dtype):
        return None
    convert = partial(convert_to_domain_parallel, shard_dim=dim)
    try:
        found = parity.errors(OPERATORS[name], shape, convert, dtype, dim)
    except Exception:
        return traceback.format_exc()
    wrong = {what: error for what, error in found.items() if not error < tolerance}
    return f"{name}: {wrong}" if wrong else None


def failures(names: list[str], *args: object) -> list[str]:
    return [text for name in names if (text := failure(name, *args))]


def check(found: list[list[str]]) -> None:
    assert not any(found), "\n".join(next(rank for rank in found if rank))


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operator_is_exact(worlds, size: int, height: int) -> None:
    check(worlds(size).run(failures, list(OPERATORS), height))


@pytest.mark.parametrize("size", [2, 3])
def test_longitude_can_be_cut_instead(worlds, size: int) -> None:
    check(worlds(size).run(failures, list(OPERATORS), 9, -1))


class Turned(torch.nn.Module):
    """The same values, with longitudes outermost in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(-1, 0).contiguous().movedim(0, -1)


AROUND = {
    "changed in place": lambda operator: torch.nn.Sequential(operator, torch.nn.LeakyReLU(0.1, inplace=True)),
    "of strides of its own": lambda operator: torch.nn.Sequential(Turned(), operator, Turned()),
}


def failures_around(what: str, height: int) -> list[str]:
    """Operators that fail beside such a neighbour, where torch's do not (refusals by name aside)."""
    found = []
    for name, operator in OPERATORS.items():

        def build(operator=operator) -> torch.nn.Module:
            return AROUND[what](operator())

        try:
            build().double()(torch.randn(2, C, height, W, dtype=torch.float64)).sum().backward()
        except (RuntimeError, ValueError, IndexError):
            continue
        try:
            errors = parity.errors(build, (2, C, height, W))
        except DomainParallelError:
            continue
        except Exception as error:
            errors = {repr(error): float("inf")}
        if not max(errors.values()) < TOLERANCE:
            found.append(f"{name}: {errors}")
    return found


@pytest.mark.parametrize("what", AROUND)
def test_operators_do_not_mind_how_torch_stores_a_tensor(worlds, what: str) -> None:
    check(worlds(3).run(failures_around, what, 12))


def failures_of_other_ranks(kind: str, length: int) -> list[str]:
    operators, shape, dim = {
        "lines": (LINES, (2, C, length), -1),
        "volumes": (VOLUMES, (2, C, 4, length, W), -2),
    }[kind]
    convert = partial(convert_to_domain_parallel, shard_dim=dim)
    found = {name: parity.errors(build, shape, convert, dim=dim) for name, build in operators.items()}
    return [f"{name}: {errors}" for name, errors in found.items() if not max(errors.values()) < TOLERANCE]


@pytest.mark.parametrize("kind", ["lines", "volumes"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_three_and_five_axes(worlds, size: int, kind: str) -> None:
    for length in (12, 17):
        check(worlds(size).run(failures_of_other_ranks, kind, length))


@settings(
    max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    name=st.sampled_from(sorted(OPERATORS)),
    size=st.sampled_from([1, 2, 2, 3, 3, 4, 5]),
    height=st.integers(1, 37),
    batch=st.sampled_from([0, 1, 1, 2, 3]),
)
def test_any_operator_at_any_height(worlds, name: str, size: int, height: int, batch: int) -> None:
    if height >= size:
        check([[text] if text else [] for text in worlds(size).run(failure, name, height, -2, batch)])


@pytest.mark.parametrize(
    "name", ["conv k3 s2 p1 d1", "group norm", "windows shifted", "avg pool k3 s2 p1 ceilTrue countTrue"]
)
def test_eight_ranks(worlds, name: str) -> None:
    check(worlds(8).run(failures, [name], 17))


# Halves round in the convolutions of shards of other shapes as they please: a few units of the type's precision.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 0.06)])
def test_lower_precision_differs_by_rounding_only(worlds, dtype: torch.dtype, tolerance: float) -> None:
    names = [
        name for name in OPERATORS if name.split()[0] in ("conv", "group", "batch", "layer", "upsample", "windows")
    ]
    check(worlds(2).run(failures, names, 17, -2, 2, dtype, tolerance))


def twice(name: str) -> bool:
    """Bitwise the same numbers from a second run."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = convert_to_domain_parallel(OPERATORS[name](), parity.manager())
        x = parity.rows_of(torch.randn(2, C, 17, W), -2).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        runs.append([y.detach(), x.grad, *[p.grad for p in model.parameters()]])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_second_run_gives_the_same_bits(worlds) -> None:
    for name in OPERATORS:
        if not name.startswith("pixel unshuffle"):  # of an odd height, refused by torch itself
            assert all(worlds(3).run(twice, name)), name
