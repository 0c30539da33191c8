"""A config of another package becomes one of ours, and no key of it is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from credit.cli import main
from credit.config import load_config, parse_config
from credit.config.foreign import FOREIGN
from credit.config.loading import _keys_at
from credit.config.migrate import migrate
from credit.errors import ConfigError
from credit.steps import to_text
from tests.stores import conf

THEIRS = Path(__file__).with_name("foreign.yml")


def theirs() -> dict[str, Any]:
    return yaml.safe_load(THEIRS.read_text())


def test_what_the_written_file_says(tmp_path, capsys, monkeypatch) -> None:
    """All keys of the file are ours; two values are asked for, and with those it is a config."""
    monkeypatch.setenv("USER", "me")
    path = tmp_path / "ours.yaml"
    assert main(["migrate", str(THEIRS), str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("error")] == [
        "error    data.levels: left out: 16 counts the levels: list them, as the store numbers them. Write data.levels",
        "error    trainer.grad_max_norm: left out: 'dynamic': clip is the largest norm of a gradient, a number. "
        "Write trainer.clip",
    ]
    config = load_config(path, ["data.levels=[1000, 500]", "trainer.clip=1.0"])
    assert str(config.run) == "/glade/derecho/scratch/me/run"
    assert config.data.variables == ["U", "V", "T", "Q", "SP", "t2m"]
    assert config.data.path[1:3] == ["/data/surface_*.zarr", "/data/solar_*.zarr"]
    assert (config.data.forcings, config.data.diagnostics, to_text(config.data.step)) == (["tsi"], ["Z500"], "6h")
    assert config.data.grid == (640, 1280)
    assert [str(time)[:10] for time in (*config.data.train, *config.data.test)] == [
        *("1979-01-01", "2014-01-01"),
        *("2019-01-01", "2020-01-11"),
    ]
    assert config.trainer.batch_size == 1 * 32 * 2  # a GPU, GPUs, parts
    assert (config.trainer.accumulate, config.trainer.ema, config.trainer.seed) == (2, 0.9999, 1000)
    assert config.trainer.parallelism.data == "fsdp2"
    assert config.model.name == "wxformer"
    assert config.model.widths == [128, 256, 512, 1024]
    assert (config.model.padding, to_text(config.forecast.lead)) == (80, "240h")
    assert main(["migrate", str(THEIRS), str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_every_key_has_a_finding_and_a_reason_if_it_is_left_out(capsys) -> None:
    main(["migrate", str(THEIRS), "--json"])
    found = json.loads(capsys.readouterr().out)
    said = {one["where"]: one for one in found}

    def leaves(block: dict[str, Any], place: str = "") -> list[str]:
        return [
            where
            for key, value in block.items()
            for where in (leaves(value, f"{place}{key}.") if isinstance(value, dict) else [f"{place}{key}"])
        ]

    for place in leaves(theirs()):
        assert any(place == where or place.startswith(f"{where}.") for where in said), place
    left = [one for one in found if one["message"].startswith("left out")]
    assert len(left) > 20
    assert all(len(one["message"]) > len("left out: ") + 15 for one in left)
    assert said["data.a_key_of_next_year"]["message"] == "not known, and left out"


def test_the_newer_form_of_their_data(tmp_path) -> None:
    given = theirs()
    given["data"] = {
        "source": {
            "ERA5": {
                "level_coord": "level",
                "levels": [1000, 500],
                "variables": {
                    "prognostic": {"vars_3D": ["T"], "vars_2D": ["SP"], "path": "/a/*.zarr"},
                    "diagnostic": None,
                    "static": {"vars_2D": ["LSM"], "path": "/s.nc"},
                },
            }
        },
        "start_datetime": "1979-01-01",
        "end_datetime": "2018-01-01",
        "timestep": "6h",
        "forecast_len": 1,
    }
    given["data_valid"] = {"start_datetime": "2018-01-01", "end_datetime": "2019-01-01"}
    given["preblocks"] = {"norm": {"type": "normalizer"}}
    given["trainer"] |= {"use_ema": False, "grad_max_norm": 1.0, "parallelism": {"tensor": 2, "domain": 4}}
    ours, findings = migrate(given, ranks=16)
    assert not [one for one in findings if one.severity == "error"]
    config = parse_config(ours)
    assert (config.data.variables, config.data.statics, config.data.levels) == (["T", "SP"], ["LSM"], [1000, 500])
    assert config.data.path == ["/a/*.zarr", "/s.nc"]
    assert (config.trainer.rollout, config.trainer.ema, config.trainer.batch_size) == (2, None, 1 * 2 * 2)
    assert config.trainer.parallelism.domain == 4


@pytest.mark.parametrize(
    "broken",
    [
        {"data": {"train_years": 3}, "trainer": {"train_batch_size": "many"}},
        {"model": {"type": "unet", "levels": 3}, "predict": {"forecasts": {"start_year": 1, "days": "x"}}},
        {"data": [], "model": "crossformer", "trainer": None, "data_valid": {"start_datetime": 1, "end_datetime": 2}},
    ],
)
def test_values_that_cannot_be_are_findings(broken) -> None:
    ours, findings = migrate(broken)
    assert [one for one in findings if one.severity == "error"]
    with pytest.raises(ConfigError):
        parse_config(ours)


def test_the_table_names_keys_that_there_are() -> None:
    """Ours all exist; the model's are the wxformer's."""
    for key, entry in FOREIGN.items():
        if entry.ours:
            *blocks, last = entry.ours.split(".")
            place = [*blocks, "wxformer"] if blocks == ["model"] else blocks
            assert last in _keys_at(tuple(place)), key
        assert entry.ours or len(entry.why) > 15, key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainer.ema_decay", "trainer.ema_decay: unknown key; here it is trainer.ema"),
        ("data.timestep", "data.timestep: unknown key; here it is data.step"),
        ("data.forecast_len", "unknown key; here it is trainer.rollout: steps beyond the first there, all steps here"),
        ("save_loc", "save_loc: unknown key; here it is run"),
        ("data.save_loc_surface", "here it is data.path: one list of all stores"),
        ("trainer.train_batch_size", "here it is trainer.batch_size: of each GPU there, over all ranks here"),
        ("ema_decay", "ema_decay: unknown key; here it is trainer.ema"),  # in another block than theirs
        ("postblocks", "postblocks: unknown key; it has no counterpart here: write constraints"),
        ("trainer.batchsize", "trainer.batchsize: unknown key; did you mean 'batch_size'?"),
    ],
)
def test_errors_know_what_a_key_of_theirs_is_here(key, message) -> None:
    raw = conf(Path("run"), Path("s.zarr"))
    *blocks, last = key.split(".")
    (raw[blocks[0]] if blocks else raw)[last] = 1
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert message in str(caught.value)
    assert "credit migrate" not in str(caught.value)


def test_a_whole_config_of_theirs_names_the_verb() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(THEIRS)
    said = str(caught.value)
    assert said.endswith(f"`credit migrate {THEIRS}` turns a config of NCAR's CREDIT into one of ours")
    assert "model.type: unknown key; here it is model.name" in said
