"""Weights from files as training programs leave them, some of them, and parameters that are not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from credit.errors import CheckpointError, ConfigError, CreditError
from credit.models.unet import UNet
from credit.parallel.weights import freeze, load_plain
from tests.training.runs import curve, exported, interrupted, losses_and_weights, on, same_rest, small


def net(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(5, 2, (13, 16), width=4, levels=1, groups=2)


def wrapped(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


FILES = {
    "plain": (lambda state: state, ""),
    "module.": (lambda state: wrapped(state, "module."), " (without 'module.')"),
    "compiled": (lambda state: wrapped(state, "module._orig_mod."), " (without 'module.', without '_orig_mod.')"),
    "inside": (lambda state: {"epoch": 3, "model_state_dict": state, "loss": 1.0}, " (from its 'model_state_dict')"),
    "lightning": (
        lambda state: {"state_dict": wrapped(state, "model."), "optimizer_states": [{"lr": 1e-3}]},
        " (from its 'state_dict', without 'model.')",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_training_programs_are_understood_and_said(tmp_path, kind) -> None:
    theirs, ours = net(1), net(2)
    make, said = FILES[kind]
    torch.save(make(theirs.state_dict()), tmp_path / "w.pt")
    number = len(theirs.state_dict())
    assert load_plain(ours, tmp_path / "w.pt") == f"{number} of {number} tensors from {tmp_path / 'w.pt'}{said}"
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_some_weights_are_taken_and_the_rest_stays_as_drawn(tmp_path) -> None:
    theirs, ours, drawn = net(1), net(2), net(2)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    names = list(theirs.state_dict())
    first = names[0].split(".")[0]
    words = load_plain(ours, tmp_path / "w.safetensors", [f"{first}.*"])
    for name in names:
        wanted = theirs if name.startswith(f"{first}.") else drawn
        assert torch.equal(ours.state_dict()[name], wanted.state_dict()[name]), name
    assert "as drawn" in words
    ours = net(2)
    load_plain(ours, tmp_path / "w.safetensors", skip=[f"{first}.*"])
    assert torch.equal(ours.state_dict()[names[0]], drawn.state_dict()[names[0]])
    assert torch.equal(ours.state_dict()[names[-1]], theirs.state_dict()[names[-1]])


@pytest.mark.parametrize(
    ("content", "only", "said"),
    [
        (lambda state: {**state, "more": torch.ones(1)}, "*", "the model has no more"),
        (lambda state: dict([*state.items()][1:]), "*", "it has no "),
        (lambda state: {name: value.unsqueeze(0) for name, value in state.items()}, "*", "has the shape"),
        (lambda state: [1, 2], "*", "the file holds list"),
        (lambda state: state, "no.such", "no parameter is named like no.such"),
        (lambda state: {"weights": nn.Linear(1, 1)}, "*", "cannot be read as weights: .*[Ww]eights.only"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(tmp_path, content, only, said) -> None:
    torch.save(content(net(1).state_dict()), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=said):
        load_plain(net(2), tmp_path / "w.pt", [only])
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_plain(net(2), tmp_path / "w.safetensors")


def test_patterns_that_freeze_nothing_or_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter is named like 'encoder"):
        freeze(net(1), ["encoder.*"])
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        freeze(net(1), ["*"])


@pytest.mark.parametrize(("data", "dp", "tensor", "domain"), [("fsdp2", 2, 1, 2), ("ddp", 2, 2, 1)])
def test_frozen_weights_stay_on_every_mesh_and_runs_of_them_go_on(worlds, tmp_path, data, dp, tensor, domain) -> None:
    raw = small(tmp_path)
    raw["model"] = {"name": "transformer", "width": 16, "depth": 2, "heads": 4, "window": 2}
    exported_from = on(raw, tmp_path / "first", "none", 1)
    curve(exported_from)
    exported(exported_from, tmp_path / "w.safetensors")
    given = load_file(tmp_path / "w.safetensors")
    frozen = [name for name in given if ".0." in name]  # the first block
    assert frozen
    raw["trainer"] |= {
        "init_from": {"path": str(tmp_path / "w.safetensors"), "skip": ["*.1.*"]},
        "freeze": ["*.0.*"],
        "ema": 0.9,
        "schedule": "constant",
    }
    losses, weights = losses_and_weights(on(raw, tmp_path / "one", "none", 1))
    assert all(np.array_equal(weights[name], given[name].double().numpy()) for name in frozen)
    assert not all(np.array_equal(value, given[name].double().numpy()) for name, value in weights.items())
    cut = on(raw, tmp_path / "cut", data, domain, tensor)
    worlds(dp * tensor * domain).run(interrupted, cut, 7)
    for found in worlds(dp * tensor * domain).run(losses_and_weights, cut):
        same_rest(found, (losses, weights))


def test_averages_of_a_model_with_buffers_are_exported(tmp_path) -> None:
    raw = small(tmp_path)
    raw["model"] = {"name": "tests.training.odd_models.Odd"}
    raw["trainer"] |= {"ema": 0.9, "epochs": 1}
    given = on(raw, tmp_path / "run", "none", 1)
    curve(given)
    exported(given, tmp_path / "w.safetensors")
    written = load_file(tmp_path / "w.safetensors")
    assert "norm.running_mean" in written
    assert "gain" in written


def of_batches(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    error = (prediction - target).square()
    return error / error.mean(dim=0, keepdim=True)


class Weighted(nn.Module):
    """For two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("of_channels", torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None])

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.of_channels * (prediction - target).square()


def signed(prediction: torch.Tensor, target: torch.Tensor, power: float) -> torch.Tensor:
    return (prediction - target).abs() ** power


def of_neighbours(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).roll(1, -2).square()


@pytest.mark.parametrize(
    ("loss", "like"),
    [
        ({"kind": "torch.nn.MSELoss", "arguments": {"reduction": "none"}}, {"kind": "mse"}),
        ({"kind": f"{__name__}.signed", "arguments": {"power": 1}}, {"kind": "mae"}),
        ({"kind": f"{__name__}.Weighted"}, None),
    ],
)
def test_a_loss_of_ones_own_is_a_mean_over_the_globe_like_any(worlds, tmp_path, loss, like) -> None:
    raw: dict[str, Any] = small(tmp_path)
    raw["trainer"] |= {"epochs": 1, "loss": like or loss}
    wanted, *_ = curve(on(raw, tmp_path / "like", "none", 1))
    raw["trainer"]["loss"] = loss
    for found, *_ in worlds(2).run(curve, on(raw, tmp_path / "own", "none", 2)):
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"kind": "torch.nn.MSELoss"}, r"must give the error of each entry by itself.*reduction: none"),
        ({"kind": f"{__name__}.of_batches"}, "must give the error of each entry by itself"),
        ({"kind": f"{__name__}.of_neighbours"}, "must give the error of each entry by itself"),
        ({"kind": f"{__name__}.signed"}, "missing 1 required positional argument: 'power'"),
        ({"kind": "rmse"}, "'rmse' is neither one of mse, mae, huber, crps nor a dotted path"),
        ({"kind": "mse", "arguments": {"a": 1}}, "arguments are for a loss by dotted path"),
    ],
)
def test_what_is_no_loss_of_entries_is_refused(tmp_path, loss, said) -> None:
    raw = small(Path(tmp_path))
    raw["trainer"]["loss"] = loss
    with pytest.raises(CreditError, match=said):
        curve(on(raw, tmp_path / "run", "none", 1))


def test_a_file_for_torch_holds_the_same(tmp_path) -> None:
    given = on(small(tmp_path), tmp_path / "run", "none", 1)
    curve(given)
    for name in ("w.safetensors", "w.pt"):
        exported(given, tmp_path / name)
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    wanted = load_file(tmp_path / "w.safetensors")
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, state[name]) for name, value in wanted.items())
    with pytest.raises(ConfigError, match=r"w.npz: name the file \*.safetensors, or \*.pt"):
        exported(given, tmp_path / "w.npz")
