"""What a forecast must satisfy holds after each step, on any mesh; the rest is what the model made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from credit.config import Constraint, parse_config
from credit.data.prepare import write_statistics
from credit.data.store import Channel
from credit.errors import ConfigError, CreditError
from credit.models.constraints import Constrained, build_constraints
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve, losses_and_weights, on

CHANNELS = [Channel("sp"), Channel("q", 500.0), Channel("q", 850.0), Channel("tp")]


def mended(before: Tensor, after: Tensor, *constraints: dict[str, Any]) -> Tensor:
    areas = torch.linspace(0.5, 1.5, before.shape[-2], dtype=torch.float64)[:, None]
    for constraint in build_constraints([Constraint(**one) for one in constraints], CHANNELS, areas):
        after = constraint(before, after)
    return after


def mean(field: Tensor) -> Tensor:
    return (field * torch.linspace(0.5, 1.5, field.shape[-2], dtype=torch.float64)[:, None]).mean(dim=(-2, -1))


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 8, dtype=torch.float64) + 3, torch.randn(2, 4, 6, 8, dtype=torch.float64) + 3


def test_no_value_is_below_zero_where_none_may_be(states) -> None:
    before, after = states
    found = mended(before, after - 3, {"name": "nonnegative", "variables": ["q_850", "tp"]})
    assert torch.equal(found[:, [2, 3]], (after - 3)[:, [2, 3]].clamp(min=0))
    assert torch.equal(found[:, :2], (after - 3)[:, :2])


@pytest.mark.parametrize("by", ["scale", "shift"])
def test_what_is_conserved_is_and_only_one_field_is_changed(states, by) -> None:
    before, after = states
    terms = {"sp": 1.0, "q": -0.5}
    wanted = {"name": "conserve", "terms": terms, "adjust": "sp", "sources": {"tp": -0.1}, "by": by}
    found = mended(before, after, wanted)
    assert torch.equal(found[:, 1:], after[:, 1:])

    def total(state: Tensor) -> Tensor:
        return mean(state[:, 0]) - 0.5 * mean(state[:, 1]) - 0.5 * mean(state[:, 2])

    torch.testing.assert_close(total(found), total(before) - 0.1 * mean(after[:, 3]), rtol=1e-13, atol=0)
    apart = found[:, 0] / after[:, 0] if by == "scale" else found[:, 0] - after[:, 0]
    torch.testing.assert_close(apart, apart[:, :1, :1].expand_as(apart))


def test_what_no_constraint_touches_is_what_the_model_made() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(5, 4, 1)
    areas, unit = torch.ones(6, 1, dtype=torch.float64), torch.full((4, 1, 1), 0.1, dtype=torch.float64)
    positive = build_constraints([Constraint(name="nonnegative", variables=["tp"])], CHANNELS, areas)
    mean_, std = torch.full_like(unit, 250.0), torch.full_like(unit, 7.0)
    constrained = Constrained(model, positive, mean_, std, unit, state=3)
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(constrained(x), model(x))  # of 250 +- 7, nothing is below zero


class HalfWay(nn.Module):
    """A constraint of a user's own: half of the step."""

    def __init__(self, channels: list, areas: Tensor, part: float) -> None:
        super().__init__()
        self.part = part

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return before + self.part * (after - before)


class Learnt(nn.Linear):
    def __init__(self, channels: list, areas: Tensor) -> None:
        super().__init__(1, 1)


def test_states_that_are_rounded_to_three_digits_satisfy_nothing(raw) -> None:
    raw["trainer"] |= {"precision": "bf16", "dtype": "float32"}
    with pytest.raises(ConfigError, match="constraints hold within the rounding of a state"):
        parse_config(raw)


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), dtype="float64")
    raw["data"]["stats"] = str(tmp_path / "stats.nc")
    raw["constraints"] = [
        {"name": f"{__name__}.HalfWay", "part": 0.5},
        {"name": "nonnegative", "variables": ["a"]},
        {"name": "conserve", "terms": {"b": 1.0, "a": 2.0}, "adjust": "b"},
    ]
    raw["trainer"]["rollout"] = 2
    write_statistics(parse_config(raw))
    return raw


@pytest.mark.parametrize(("data", "dp", "tensor", "domain"), [("fsdp2", 2, 1, 2), ("ddp", 1, 2, 3)])
def test_a_run_is_that_of_one_process(worlds, raw, tmp_path, data, dp, tensor, domain) -> None:
    if tensor > 1:
        raw["model"] = {"name": "transformer", "width": 16, "depth": 1, "heads": 4, "window": 2}
    losses, weights = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    free, _ = losses_and_weights({**on(raw, tmp_path / "free", "none", 1), "constraints": []})
    assert abs(np.array(free) - losses).max() > 1e-3
    for found, values in worlds(dp * tensor * domain).run(
        losses_and_weights, on(raw, tmp_path / "cut", data, domain, tensor)
    ):
        np.testing.assert_allclose(found, losses, rtol=1e-8)
        for name, value in weights.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"name": "positive"}, "'positive' is neither one of nonnegative, conserve nor a dotted path"),
        ({"name": "nonnegative", "variables": ["c"]}, "c is not among what is predicted: a, b"),
        ({"name": "nonnegative"}, r"constraints: nonnegative: .*missing .*'variables'"),
        ({"name": "conserve", "terms": {"a": 1}, "adjust": "b"}, "adjust: b is not among the terms"),
        ({"name": "conserve", "terms": ["a"], "adjust": "a"}, "constraints: conserve: .*has no attribute"),
        ({"name": "conserve", "terms": {"a": "one"}, "adjust": "a"}, "constraints: conserve: .*could not convert"),
        ({"name": f"{__name__}.Learnt"}, "has parameters: what is trained belongs into the model"),
        ({"name": "no_such.Thing"}, "constraints: no_such.Thing: .*importing no_such failed"),
    ],
)
def test_what_cannot_be_is_refused_in_words(raw, constraint, said) -> None:
    raw["constraints"] = [constraint]
    with pytest.raises((ConfigError, CreditError), match=said):
        curve(raw)
