"""Every operator at every height: sharded == plain in float64, output, input gradient and every parameter gradient."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from credit.domain_parallel import convert_to_domain_parallel
from tests.domain_parallel import parity
from tests.domain_parallel.operators import LINES, OPERATORS, VOLUMES, C, W

TOLERANCE = 1e-9
HEIGHTS = (5, 12, 16, 17)


def expected(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> parity.Expected | None:
    """None where torch itself refuses (a reflection wider than the field, windows that do not divide)."""
    try:
        found = parity.expected(build, shape, dtype)
    except (RuntimeError, ValueError, IndexError):
        return None
    return found if found.output.numel() > 0 or shape[0] == 0 else None


def failure(
    world: Any,
    name: str,
    height: int,
    dim: int = -2,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
) -> str | None:
    """What is wrong with the operator at this height: the errors, or the traceback."""
    found = expected(OPERATORS[name], (batch, C, height, W) if dim == -2 else (batch, C, 9, W), dtype)
    if found is None:
        return None
    return verdict(world, name, found, partial(convert_to_domain_parallel, shard_dim=dim), dim, tolerance)


def verdict(
    world: Any, name: str, found: parity.Expected, convert: parity.Convert, dim: int = -2, tolerance: float = TOLERANCE
) -> str | None:
    try:
        ranks = world.run(parity.departures, found, convert, dim)
    except Exception:
        return f"{name}: {traceback.format_exc()}"
    worst = {what: max(rank[what] for rank in ranks) for what in ranks[0]}
    wrong = {what: error for what, error in worst.items() if not error < tolerance}
    return f"{name}: {wrong}" if wrong else None


def check(world: Any, names: Iterable[str], *args: Any) -> None:
    found = [text for name in names if (text := failure(world, name, *args))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operator_is_exact(threads, size: int, height: int) -> None:
    check(threads(size), OPERATORS, height)


@pytest.mark.parametrize("size", [2, 3])
def test_longitude_can_be_cut_instead(threads, size: int) -> None:
    check(threads(size), OPERATORS, 9, -1)


class Turned(torch.nn.Module):
    """The same values, with longitudes outermost in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(-1, 0).contiguous().movedim(0, -1)


AROUND = {
    "changed in place": lambda operator: torch.nn.Sequential(operator, torch.nn.LeakyReLU(0.1, inplace=True)),
    "of strides of its own": lambda operator: torch.nn.Sequential(Turned(), operator, Turned()),
}


@pytest.mark.parametrize("what", AROUND)
def test_operators_do_not_mind_how_torch_stores_a_tensor(threads, what: str) -> None:
    """Where torch can run an operator beside such a neighbour, so can the ranks; none is refused."""
    wrong = []
    for name, operator in OPERATORS.items():
        found = expected(lambda operator=operator: AROUND[what](operator()), (2, C, 12, W))
        if found is not None:
            wrong.append(verdict(threads(3), name, found, convert_to_domain_parallel))
    assert not any(wrong), "\n".join(filter(None, wrong))


LINES_AND_VOLUMES = {
    "lines": (LINES, lambda length: (2, C, length), -1),
    "volumes": (VOLUMES, lambda length: (2, C, 4, length, W), -2),
}


@pytest.mark.parametrize("kind", LINES_AND_VOLUMES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_three_and_five_axes(threads, size: int, kind: str) -> None:
    operators, shape, dim = LINES_AND_VOLUMES[kind]
    convert = partial(convert_to_domain_parallel, shard_dim=dim)
    for length in (12, 17):
        cases = {name: parity.expected(build, shape(length)) for name, build in operators.items()}
        found = [text for name, case in cases.items() if (text := verdict(threads(size), name, case, convert, dim))]
        assert not found, "\n".join(found)


@settings(
    max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    name=st.sampled_from(sorted(OPERATORS)),
    size=st.sampled_from([1, 2, 2, 3, 3, 4, 5]),
    height=st.integers(1, 37),
    batch=st.sampled_from([0, 1, 1, 2, 3]),
)
def test_any_operator_at_any_height(threads, name: str, size: int, height: int, batch: int) -> None:
    if height >= size:
        check(threads(size), [name], height, -2, batch)


@pytest.mark.parametrize(
    "name", ["conv k3 s2 p1 d1", "group norm", "windows shifted", "avg pool k3 s2 p1 ceilTrue countTrue"]
)
def test_eight_ranks(threads, name: str) -> None:
    check(threads(8), [name], 17)


# Halves round in the convolutions of shards of other shapes as they please: a few units of the type's precision.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 0.06)])
def test_lower_precision_differs_by_rounding_only(threads, dtype: torch.dtype, tolerance: float) -> None:
    names = [
        name for name in OPERATORS if name.split()[0] in ("conv", "group", "batch", "layer", "upsample", "windows")
    ]
    check(threads(2), names, 17, -2, 2, dtype, tolerance)


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


def test_a_second_run_gives_the_same_bits(threads) -> None:
    for name in OPERATORS:
        if not name.startswith("pixel unshuffle"):  # of an odd height, refused by torch itself
            assert all(threads(3).run(twice, name)), name
