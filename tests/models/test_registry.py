"""Models by name: the package's own, and any class by its dotted path, which every verb then works with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from credit.cli import main
from credit.config import load_config, parse_config
from credit.config.models import MODELS
from credit.errors import ConfigError
from credit.models import build_model, load_model_class
from tests.models.kinds import SMALL
from tests.models.parity import errors
from tests.stores import conf, dataset, write_zarr

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    _tp_col, _tp_row = "expand", "project"

    def __init__(self, in_channels, out_channels, grid, width=8, depth=1):
        super().__init__()
        self.grid = grid
        self.look = nn.Sequential(*[nn.Conv2d(in_channels, in_channels, 5, padding=2) for _ in range(depth)])
        self.expand = nn.Conv2d(in_channels, width, 1)
        self.project = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        assert x.shape[-2:] == self.grid
        return self.project(torch.tanh(self.expand(self.look(x))))

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A config whose model is a class in a file of the user's own."""
    (tmp_path / "my_models.py").write_text(OWN)
    (tmp_path / "my_broken.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), epochs=1)
    raw["model"] = {"name": "my_models.Net", "width": 4}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_every_verb_works_with_a_class_of_ones_own(own, capsys) -> None:
    assert main(["data", "stats", str(own)]) == 0
    assert main(["check", str(own), "--ranks", "2", "--set", "trainer.parallelism.domain=2"]) == 0
    assert "my_models.Net, 664 parameters, 5 -> 2 channels" in capsys.readouterr().out
    assert main(["plan", str(own), "--gpus", "4", "--gpu-memory", "1"]) == 0
    assert "Recommended: dp 1 x tp" in capsys.readouterr().out
    assert main(["train", str(own)]) == 0
    assert "my_models.Net: 664 parameters" in capsys.readouterr().out
    assert main(["forecast", str(own)]) == 0
    assert main(["export", str(own), str(own.with_name("weights.safetensors"))]) == 0
    weights = load_file(own.with_name("weights.safetensors"))
    build_model(load_config(own).model, 5, 2, (13, 16)).load_state_dict(weights)


def test_it_is_proved_exact_over_ranks(own) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(own.parent), os.getcwd()])}
    command = [sys.executable, "-m", "credit", "check", "parity", str(own), "--ranks", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "my_models.Net on 5 -> 2 random fields of 13 x 16" in done.stdout
    assert "parity over 2 domain ranks, torch.float64: exact" in done.stdout


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "no_such.Net"}, "no_such.Net: importing no_such failed with ModuleNotFoundError: No module named"),
        ({"name": "my_broken.Net"}, "importing my_broken failed with ModuleNotFoundError: No module named 'not_there'"),
        ({"name": "my_models.Nett"}, "model.name: my_models has no Nett"),
        ({"name": "my_models.Other"}, "model.name: my_models.Other is no subclass of torch.nn.Module"),
        ({"name": "my_models.torch"}, "model.name: my_models.torch is no subclass of torch.nn.Module"),
        ({"name": "my_models.Net", "widht": 4}, "got an unexpected keyword argument 'widht'"),
        ({"name": ".Net"}, "importing  failed with ValueError: Empty module name"),
    ],
)
def test_what_is_no_model_is_refused(own, model, message, capsys) -> None:
    raw = yaml.safe_load(own.read_text()) | {"model": model}
    config = parse_config(raw)
    with pytest.raises(ConfigError) as caught:
        build_model(config.model, 5, 2, (13, 16))
    assert message in str(caught.value)
    own.write_text(yaml.safe_dump(raw))
    assert main(["check", str(own)]) == 1
    assert message.split(":")[-1] in capsys.readouterr().out
    assert main(["plan", str(own), "--gpus", "1", "--gpu-memory", "1"]) == 2


def test_arguments_are_part_of_the_config(own) -> None:
    config, other = load_config(own), load_config(own, ["model.width=5"])
    assert config.digest != other.digest
    assert parse_config(other.to_dict()) == other
    assert build_model(other.model, 5, 2, (13, 16)).expand.out_channels == 5


@pytest.mark.parametrize("name", MODELS)
def test_each_of_the_packages_own_is_exact_over_ranks(name: str) -> None:
    options = MODELS[name](name=name, **SMALL.get(name, {})).model_dump(exclude={"name"})
    assert errors(name, (5, 3), (24, 48), tp=1, domain=3, **options) == {}


def test_the_packages_own_models_take_what_their_blocks_say() -> None:
    needed = {"pangu": {"upper": 1, "levels": 2}}
    blocks = [{"name": name, **needed.get(name, {})} for name in MODELS]
    blocks += [{"name": "wxformer", "spectral_norm": True}]
    for block in blocks:
        raw = conf(Path("run"), Path("s.zarr")) | {"model": block}
        with torch.device("meta"):
            model = build_model(parse_config(raw).model, 5, 2, (96, 192))
        assert type(model) is load_model_class(MODELS[block["name"]].path)
