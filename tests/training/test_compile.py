"""Compiled blocks == blocks as they are, on every mesh that takes them."""

from __future__ import annotations

import os
from functools import partialmethod

import pytest
import torch
from torch import nn

from credit.config import parse_config
from credit.domain_parallel.recorded import Recording
from credit.errors import ConfigError, CreditError
from credit.launch.job import start_job
from credit.parallel.fsdp2 import compile_blocks
from credit.training.train import TrainingRun
from tests.training.runs import curve, on, small, with_transformer


@pytest.fixture
def raw(tmp_path) -> dict:
    given = with_transformer(small(tmp_path))
    given["trainer"].update(epochs=1)
    return given


def compiled(raw: dict, **more: object) -> dict:
    return {**raw, "trainer": {**raw["trainer"], "compile": True, **more}}


def traced_curve(raw: dict) -> tuple:
    """Without inductor, whose C++ takes minutes to compile: what it is given, and the hooks around it, are the same."""
    real = nn.Module.compile
    os.environ["CXX"] = "true"  # no compiler is needed then
    nn.Module.compile = partialmethod(real, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        found = curve(raw)
    finally:
        nn.Module.compile = real
        del os.environ["CXX"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return found


MESHES = {
    "ddp": (2, "ddp", {}),
    "fsdp2, in parts": (2, "fsdp2", {"accumulate": 2, "rollout": 2}),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_curve_of_the_plain_model(worlds, raw, tmp_path, name: str) -> None:
    size, data, more = MESHES[name]
    raw["trainer"].update(more)
    losses, valid, norms = curve(on(raw, tmp_path / "plain", "none", 1))
    for found in worlds(size).run(traced_curve, compiled(on(raw, tmp_path / "compiled", data, 1))):
        assert found[0] == pytest.approx(losses, rel=1e-9, abs=0)
        assert found[1] == pytest.approx(valid, rel=1e-9, abs=0)
        assert found[2] == pytest.approx(norms, rel=1e-8, abs=0)


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


class Squares(nn.Module):
    fsdp_blocks = (Square,)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Square() for _ in range(number))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block(x[: i + 2]) for i, block in enumerate(self.blocks)]


def test_every_shape_has_code_of_its_own_however_many(monkeypatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Squares(20)
    compile_blocks(model)
    model(torch.ones(30))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 20


@pytest.mark.slow
def test_real_code_is_generated_and_gives_the_same_numbers(raw, tmp_path) -> None:
    raw["model"] = {"name": "unet", "width": 4, "levels": 1, "groups": 2}
    losses, *_ = curve(on(raw, tmp_path / "plain", "none", 1))
    torch._dynamo.utils.counters.clear()
    found, *_ = curve(compiled(on(raw, tmp_path / "compiled", "none", 1)))
    assert found == pytest.approx(losses, rel=1e-9, abs=0)
    assert torch._dynamo.utils.counters["inductor"]


@pytest.mark.parametrize("how", ["compile", "record"])
@pytest.mark.parametrize("axis", ["tensor", "domain"])
def test_fsdp2_of_a_model_that_is_cut_is_refused(raw, axis: str, how: str) -> None:
    raw["trainer"] |= {how: True, "parallelism": {"data": "fsdp2", axis: 2}}
    with pytest.raises(
        ConfigError, match=f"trainer: {how} with parallelism.{axis}: 2 records what the whole model does"
    ):
        parse_config(raw)


RECORDED = {
    "none": (2, 2, 1, {"accumulate": 2}),
    "ddp": (4, 2, 1, {"rollout": 2}),
    "channels": (4, 2, 2, {"accumulate": 2, "rollout": 2}),
}


@pytest.mark.parametrize(
    "name", [name if name == "none" else pytest.param(name, marks=pytest.mark.slow) for name in RECORDED]
)
def test_a_recorded_run_is_the_eager_run(worlds, raw, tmp_path, name: str) -> None:
    """To the last bit, averaged weights and validation too."""
    size, domain, tensor, more = RECORDED[name]
    raw["trainer"].update(more)
    data = "ddp" if name == "ddp" else "none"
    eager = worlds(size).run(curve, on(raw, tmp_path / "eager", data, domain, tensor))
    given = on(raw, tmp_path / "recorded", data, domain, tensor)
    given["trainer"]["record"] = True
    assert worlds(size).run(recorded_curve, given) == eager


def recorded_curve(raw: dict) -> tuple:
    replays: list[object] = []
    real = Recording.__call__
    Recording.__call__ = lambda self, leaves: (replays.append(self), real(self, leaves))[1]  # type: ignore[method-assign]
    try:
        found = curve(raw)
    finally:
        Recording.__call__ = real  # type: ignore[method-assign]
    assert len(replays) > 3
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("ddp", 2, 1), ("none", 1, 2)], ids=str)
def test_a_compiled_run_of_a_cut_model_is_the_eager_run(worlds, raw, tmp_path, mesh: tuple) -> None:
    data, domain, tensor = mesh
    losses, valid, norms = curve(on(raw, tmp_path / "plain", "none", 1))
    given = compiled(on(raw, tmp_path / "compiled", data, domain, tensor))
    for found in worlds(2).run(recorded_curve, given, timeout=1500):
        assert found[0] == pytest.approx(losses, rel=1e-9, abs=0)
        assert found[1] == pytest.approx(valid, rel=1e-9, abs=0)
        assert found[2] == pytest.approx(norms, rel=1e-8, abs=0)


def test_blocks_that_are_run_again_are_refused(raw) -> None:
    with pytest.raises(ConfigError, match="trainer: compile and activation_checkpointing do not go together"):
        parse_config(compiled(raw, activation_checkpointing=True))


def test_no_compiler_is_said_at_once(raw, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        start_job(lambda: parse_config(compiled(raw))) as job,
        pytest.raises(CreditError, match=r"trainer.compile needs a C\+\+ compiler, and there is no no-such-compiler"),
    ):
        TrainingRun(job)
