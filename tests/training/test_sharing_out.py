"""However a batch is shared out, over replicas or one part after another, a run is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from credit.errors import CreditError
from credit.parallel.look import look_at
from tests.training.runs import curve, interrupted, losses_and_weights, on, small

MODELS = "tests.training.odd_models"


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return with_model(small(tmp_path), "Odd", batch_size=4, epochs=2)


def with_model(raw: dict[str, Any], name: str, **trainer: Any) -> dict[str, Any]:
    return {**raw, "model": {"name": f"{MODELS}.{name}"}, "trainer": {**raw["trainer"], **trainer}}


def same(found: tuple, wanted: tuple) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-8)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("data", "dp", "domain"), [("none", 1, 2), ("ddp", 2, 1), ("fsdp2", 1, 2)])
def test_gradients_on_their_way_are_those_of_one_process(worlds, raw, tmp_path, data, dp, domain) -> None:
    raw = with_model(raw, "Clipped")
    wanted = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    for found in worlds(2).run(losses_and_weights, on(raw, tmp_path / "other", data, domain)):
        same(found, wanted)


@pytest.mark.parametrize(
    ("data", "dp", "domain", "trainer"),
    [
        ("none", 1, 1, {"accumulate": 2}),
        ("none", 1, 2, {"accumulate": 2}),
        ("ddp", 2, 1, {}),
        ("ddp", 2, 2, {}),
        ("fsdp2", 2, 1, {"accumulate": 2}),
        ("fsdp2", 2, 2, {"activation_checkpointing": True}),
        ("ddp", 2, 1, {"rollout": 2, "loss": {"kind": "crps", "members": 2}}),
        ("none", 1, 1, {"slices": 3, "accumulate": 2, "activation_checkpointing": True}),
        ("ddp", 2, 1, {"slices": 2, "rollout": 2, "loss": {"kind": "crps", "members": 2}}),
    ],
)
def test_a_run_is_that_of_one_process(worlds, raw, tmp_path, data, dp, domain, trainer) -> None:
    shared = {key: value for key, value in trainer.items() if key in ("rollout", "loss")}
    wanted = losses_and_weights(on(with_model(raw, "Odd", **shared), tmp_path / "one", "none", 1))
    other = on(with_model(raw, "Odd", **trainer), tmp_path / "other", data, domain)
    ranks = dp * domain
    for found in worlds(ranks).run(losses_and_weights, other) if ranks > 1 else [losses_and_weights(other)]:
        same(found, wanted)


def test_a_resumed_run_is_the_uninterrupted_one(worlds, raw, tmp_path) -> None:
    """Of a model with a parameter that has no gradient, on another mesh."""
    wanted = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    worlds(2).run(interrupted, on(raw, tmp_path / "two", "ddp", 1), 8)
    losses, weights = losses_and_weights(on(raw, tmp_path / "two", "none", 1))
    same((losses, weights), (wanted[0][-len(losses) :], wanted[1]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Normed", r"norm.running_var \(BatchNorm2d\)"),
        ("Turned", "what it draws .* does not have the samples as its first axis"),
    ],
)
def test_what_depends_on_how_a_batch_is_shared_out_is_refused(raw, tmp_path, name, said) -> None:
    curve(on(with_model(raw, name), tmp_path / "one", "none", 1))
    with pytest.raises(CreditError, match=said):
        curve(on(with_model(raw, name, accumulate=2), tmp_path / "parts", "none", 1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Lost", r"calls \(Lost\): a forward changes this buffer, and checkpoints do not"),
        ("Elsewhere", "draws from numpy's generator in its forward"),
    ],
)
def test_what_a_resumed_run_would_not_have_is_refused(raw, tmp_path, name, said) -> None:
    with pytest.raises(CreditError, match=said):
        curve(on(with_model(raw, name), tmp_path / "run", "none", 1))


def test_a_gradient_that_is_not_finite_is_skipped_on_request(worlds, raw, tmp_path) -> None:
    """Once, on every mesh alike; and for ever is an error."""
    once = with_model(raw, "HasRoot", nonfinite="skip")
    once["model"] |= {"at": 5, "until": 6}
    wanted = losses_and_weights(on(once, tmp_path / "one", "none", 1))
    assert all(np.isfinite(value).all() for value in wanted[1].values())
    for found in worlds(2).run(losses_and_weights, on(once, tmp_path / "two", "ddp", 1)):
        same(found, wanted)
    for_ever = with_model(raw, "HasRoot", nonfinite="skip", epochs=4)
    with pytest.raises(CreditError, match=r"the norm of the gradient is nan at step 11, of "):
        curve(on(for_ever, tmp_path / "for ever", "none", 1))


class Counting(nn.Conv2d):
    """Its output depends on how often it was called, which it keeps in attributes."""

    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.calls, self.seen, self.last = 0, [], {"rows": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.last["rows"], self.new = x.shape[2], True
        return super().forward(x) / self.calls


def test_a_look_at_a_model_leaves_its_attributes_as_they_were(caplog) -> None:
    """Training begins with the first call of all, as on one device without a look; and a resume is warned of."""
    model = Counting()
    look_at(model, model, torch.randn(2, 3, 4, 5), is_shared_out=True)
    assert (model.calls, model.seen, model.last, hasattr(model, "new")) == (0, [], {"rows": 0}, False)
    assert "calls (Counting): a forward changes this number, and checkpoints do not hold it" in caplog.text
