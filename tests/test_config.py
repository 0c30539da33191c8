"""The config: what is accepted, and what the error says of what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from credit.config import load_config, parse_config
from credit.errors import ConfigError
from tests.stores import conf

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def raw() -> dict:
    return conf(Path("run"), Path("s.zarr"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_written_back_alike(path) -> None:
    config = load_config(path)
    assert parse_config(config.to_dict()) == config
    assert parse_config(config.to_dict()).digest == config.digest


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"quickstart.yaml", "era5_sample.yaml"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.batchsize", 2, "trainer.batchsize: unknown key; did you mean 'batch_size'?"),
        ("trainer.parallelism.domian", 2, "trainer.parallelism.domian: unknown key; did you mean 'domain'?"),
        ("colour", 1, "colour: unknown key; known keys: run, data, model, constraints, trainer, forecast"),
        ("data.stepp", "6h", "data.stepp: unknown key; did you mean 'step'?"),
        ("trainer.parallelism.domain", "two", "trainer.parallelism.domain: input should be a valid integer, got 'two'"),
        ("trainer.parallelism.domain", 0, "trainer.parallelism.domain: input should be greater than or equal to 1"),
        ("trainer.epochs", None, "trainer.epochs: input should be a valid integer"),
        ("data.step", "6 hours", "data.step: '6 hours' is not a duration; write it like"),
        ("data.train", ["2020-02-01", "2020-01-01"], "data.train: the period starts at 2020-02-01"),
        ("data.test", ["2020-01-03", "2020-01-11"], "data: train and test share times"),
        ("trainer.slices", 0, "trainer.slices: must be auto, or a number from 1 to "),
        ("trainer.slices", "four", "trainer.slices: must be auto, or a number from 1 to "),
        ("data.missing", {"a": "ask"}, "data.missing.a: must be a number of at most 1e+30, or mask, got 'ask'"),
        ("data.missing", {"a": float("nan")}, "data.missing.a: must be a number of at most 1e+30, or mask, got nan"),
        ("model.width", 6, "model: groups 2 does not divide width 6"),
        ("model.name", "unett", "model.name: must be one of unet, unet_diffusion, transformer, wxformer, pangu"),
        ("model", {"name": "wxformer", "width": 8}, "model.width: unknown key; did you mean 'widths'?"),
        ("model", {"name": "wxformer", "depths": [1]}, "model: depths has 1 entries, and widths has 4"),
        ("model", {"name": "wxformer", "head_width": 48}, "model: head_width 48 does not divide width 64"),
        (
            "model",
            {"name": "wxformer", "strides": [3, 2, 2, 2]},
            "model: kernels [4, 8, 16, 32] must be their stride of 3",
        ),
        (
            "model",
            "unet",
            "model.name: must be one of unet, unet_diffusion, transformer, wxformer, pangu",
        ),
        (
            "trainer.loss.kind",
            "rmse",
            "trainer.loss.kind: 'rmse' is neither one of mse, mae, huber, crps nor a dotted path",
        ),
        (
            "trainer.loss.weights",
            {},
            "trainer.loss.weights: unknown key; known keys: kind, arguments, delta, members, variables, levels",
        ),
        (
            "trainer.loss.variables",
            {"z": 2},
            "config: trainer.loss.variables: z is not among data.variables: ['a', 'b']",
        ),
        ("trainer.loss.levels", {500: 2}, "config: trainer.loss.levels: 500.0 is not among data.levels: []"),
        ("trainer.loss.variables", {"a": -1}, "trainer.loss.variables.a: input should be greater than or equal to 0"),
        ("model", {"name": "pangu", "upper": 1, "levels": 2, "width": 7}, "model: heads 6 does not divide width 7"),
        ("model", {"name": "unet_diffusion", "heads": 3}, "model: heads 3 does not divide width x 2^levels, 128"),
        ("forecast.lead", "7h", "config: forecast.lead 7 h is not a multiple of data.step"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(raw, key, value, message) -> None:
    *parents, last = key.split(".")
    block = raw
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    if key == "model.width":
        block["groups"] = 4
        message = message.replace("groups 2", "groups 4")
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)


def test_levels_of_the_model_are_those_of_the_data(raw) -> None:
    raw["data"]["levels"], raw["model"] = [1000, 500], {"name": "pangu", "upper": 1, "levels": 3}
    with pytest.raises(ConfigError, match=r"model\.levels is 3, and data\.levels names 2"):
        parse_config(raw)


def test_a_missing_key_is_named(raw) -> None:
    del raw["trainer"]["batch_size"], raw["data"]["step"]
    with pytest.raises(ConfigError, match=r"data\.step: missing; trainer\.batch_size: missing"):
        parse_config(raw)


def test_values_replaced_from_the_command_line(raw, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = load_config(path, ["trainer.epochs=7", "trainer.parallelism.domain=3", "data.variables=[b]"])
    assert (config.trainer.epochs, config.trainer.parallelism.domain, config.data.variables) == (7, 3, ["b"])
    with pytest.raises(ConfigError, match=r"cannot set 'trainer.epochs': write it as trainer.epochs=2"):
        load_config(path, ["trainer.epochs"])
    with pytest.raises(ConfigError, match=r"cannot set run.x: run is a value, not a block"):
        load_config(path, ["run.x=1"])


def test_a_file_that_is_no_config_is_refused(tmp_path) -> None:
    for text, message in (("a: [", "is not valid YAML"), ("- 1", "must hold the keys run, data, model")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "c.yaml")
