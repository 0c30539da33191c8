"""The page of all keys and the schema for editors say what the classes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from credit.cli import main
from credit.config import load_config
from credit.config.reference import PAGE, SCHEMA, page, schema
from credit.errors import ConfigError
from credit.init import config_names

ROOT = Path(__file__).parents[1]
FROM = {"lead": "1d", "start": "latest"}


def complaints(raw: Any) -> list[str]:
    """What an editor would mark: of YAML as JSON, in which times are text."""
    as_json = json.loads(json.dumps(raw, default=str))
    return [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(as_json)]


def test_both_files_are_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), "run `make reference`"
    assert PAGE.read_text() == page(), "run `make reference`"


def test_every_key_is_explained() -> None:
    silent = [
        f"{name}.{key}"
        for name, block in schema()["$defs"].items()
        for key, value in block["properties"].items()
        if not ({"description", "$ref"} & value.keys()) and "const" not in value
    ]
    assert not silent


@pytest.mark.parametrize("name", config_names())
def test_a_shipped_config_fits_the_schema(name: str) -> None:
    assert not complaints(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("place", "value", "fits"),
    [
        ("trainer.epoch", 3, False),
        ("trainer.epochs", 0, False),
        ("trainer.epochs", 2.5, False),
        ("data.step", "6", False),
        ("data.step", "1d", True),
        ("data.step", "15min", True),
        ("data.path", ["a.zarr", "b.zarr"], True),
        ("data.path", {"path": "a.zarr"}, False),
        (
            "forecast",
            {"lead": "1d", "start": "latest", "source": [{"path": "a.zarr", "names": {"2t": "t2m"}}, "b"]},
            True,
        ),
        ("forecast", {"lead": "1d", "start": "latest", "source": {"path": "a.zarr"}}, True),
        ("forecast", {"lead": "1d", "start": "latest", "source": {"paths": "a.zarr"}}, False),
        ("data.train", ["2011-01-15T06", "2011-05-15"], True),
        ("data.train", ["soon", "later"], False),
        ("data.grid", "region", True),
        ("trainer.init_from", "w.safetensors", True),
        ("trainer.init_from", {"path": "w.pt", "only": ["encoder.*"]}, True),
        ("trainer.loss", {"kind": "huber", "delta": 2}, True),
        ("trainer.precision", "fp16", False),
        ("model", {"name": "my_package.MyModel", "anything": 3}, True),
        ("model", {"name": "unet", "widht": 3}, False),
        ("model", {"name": "nothing"}, False),
    ],
)
def test_the_schema_takes_what_the_config_takes(place: str, value: object, fits: bool, tmp_path) -> None:
    raw = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    *parents, last = place.split(".")
    block = raw
    for parent in parents:
        block = block[parent]
    block[last] = value
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert (not complaints(raw)) == fits
    if fits:
        load_config(path)
    else:
        with pytest.raises(ConfigError):
            load_config(path)


def test_a_starter_config_names_the_installed_schema(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart"]) == 0
    first = Path("quickstart.yaml").read_text().splitlines()[0]
    assert json.loads(Path(first.removeprefix("# yaml-language-server: $schema=")).read_text()) == schema()
