"""A model leaves its run as a directory: the same forecast from it alone, and no byte of it changes unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import load_file

from credit import hub
from credit.checks.certificate import certify, verify
from credit.cli import main
from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.errors import CheckpointError, CreditError
from credit.evaluation.export import export
from credit.evaluation.forecast import forecast
from credit.evaluation.package import CERTIFICATE, FILES
from credit.launch.job import start_job
from credit.models import load_model_class
from tests.stores import conf, dataset, with_forcing, write_zarr
from tests.training.runs import curve, exported, on

KINDS: dict[str, dict[str, Any]] = {
    "history, diagnostics, statics, a constraint, float32": {
        "data": {"variables": ["c", "a"], "diagnostics": ["b"], "history": 2, "levels": [500]},
        "constraints": [{"name": "nonnegative", "variables": ["a"]}],
    },
    "an ensemble, stored forcings, float64": {
        "data": {"forcings": ["cos_zenith", "warmth"]},
        "trainer": {"dtype": "float64", "loss": {"kind": "crps", "members": 2}},
        "forecast": {"members": 2},
    },
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> tuple[dict[str, Any], Path, Path]:
    """(config, its store, the directory)."""
    folder = tmp_path_factory.mktemp("run")
    store = write_zarr(folder / "s.zarr", with_forcing(dataset(levels=(500.0,))))
    raw = conf(folder / "run", store, epochs=1)
    for block, more in KINDS[request.param].items():
        raw[block] = raw[block] | more if isinstance(more, dict) else more
    raw["data"]["stats"] = str(folder / "stats.nc")
    write_statistics(parse_config(raw))
    curve(raw)
    exported(raw, folder / "model")
    return raw, store, folder / "model"


def cast(raw: dict[str, Any], **given: Any) -> xr.Dataset:
    with start_job(lambda: parse_config({**raw, "forecast": {**raw["forecast"], **given}})) as job:
        path = forecast(job)
    with xr.open_zarr(path, consolidated=False) as found:
        return found.load()


def values(fields: xr.Dataset, channel: Any, **at: Any) -> np.ndarray:
    """Of one channel in a store."""
    field = fields[channel.variable].isel(**at)
    return (field if channel.level is None else field.sel(level=channel.level)).values


def test_it_is_pushed_and_gives_the_same_forecast_bit_for_bit(trained, tmp_path) -> None:
    """Each member by its number."""
    raw, store, directory = trained
    wanted = cast(raw)
    pushed = hub.push(directory, f"file://{tmp_path / 'pushed'}")
    model = hub.from_pretrained(f"file://{pushed}")
    said = model.described
    with xr.open_zarr(store, consolidated=False) as known:
        known = known.load()
    is_a_mean = "warmth" in raw["data"]["forcings"]  # of float32 fields that are one and the same
    starts = wanted.init_time.values[:1]
    history = said.config.data.history
    places = [int(np.flatnonzero(known.time.values == starts[0])[0]) - back for back in range(history)]
    fields = np.stack([[values(known, one, time=place) for one in said.channels[: said.state]] for place in places])
    one = fields[None, :, :1]
    for odd in (fields, one[..., :-1, :], np.repeat(one, said.state + 1, 2)):
        with pytest.raises(CreditError, match="states are of shape"):
            model.normalised(torch.from_numpy(odd))
    for member in range(said.config.forecast.members):
        steps = model.steps(model.normalised(torch.from_numpy(fields)[None]), starts, member)
        for lead, made in zip(range(wanted.sizes["lead_time"]), steps, strict=False):
            at = {"init_time": 0, "lead_time": lead} | ({"number": member} if "number" in wanted.dims else {})
            for i, channel in enumerate(said.channels):
                found, there = model.physical(made)[0, i].numpy(), values(wanted, channel, **at)
                if is_a_mean:
                    np.testing.assert_allclose(found, there, rtol=1e-6)
                else:
                    np.testing.assert_array_equal(found, there)
    with pytest.raises(CreditError, match="is there already"):
        hub.push(directory, tmp_path / "pushed")


def test_the_class_it_names_is_that_of_the_model(trained) -> None:
    _, _, directory = trained
    named = json.loads((directory / "config.json").read_text())["class"]
    assert load_model_class(named) is type(hub.from_pretrained(directory).model)


def test_a_run_forecasts_with_a_directory_as_with_its_checkpoint(trained, tmp_path) -> None:
    raw, _, directory = trained
    wanted = cast(raw)
    elsewhere = {**raw, "run": str(tmp_path / "elsewhere")}
    xr.testing.assert_identical(cast(elsewhere, weights=str(directory)).drop_attrs(), wanted.drop_attrs())


def test_it_is_written_alike_from_every_mesh(trained, worlds, tmp_path) -> None:
    raw, _, directory = trained
    worlds(2).run(exported, on(raw, Path(raw["run"]), "none", 2), tmp_path / "two")
    for name in ("model.safetensors", "fields.safetensors"):
        found, wanted = load_file(tmp_path / "two" / name), load_file(directory / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_any_changed_byte_is_found_and_named(trained, tmp_path) -> None:
    """One byte of each file, at its beginning, middle and end; a file too many, and one too few."""
    _, _, directory = trained
    copy = shutil.copytree(directory, tmp_path / "model")
    certify(copy, {"config": "x"}, [(1, 2)], trust=False)
    assert {one.severity for one in verify(copy)} == {"ok"}
    names = [name for name in FILES if (copy / name).exists()]
    assert len(names) >= 4
    for name in names:
        good = (copy / name).read_bytes()
        for place in (0, len(good) // 2, len(good) - 1):
            (copy / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            found = [one for one in verify(copy, files_only=True) if one.severity == "error"]
            assert [one.where for one in found] == [name], (name, place)
            with pytest.raises(CheckpointError, match=name):
                hub.from_pretrained(copy)
        (copy / name).write_bytes(good)
    (copy / FILES[2]).rename(tmp_path / "away")
    assert [str(one) for one in verify(copy)] == [f"error    {FILES[2]}: {FILES[2]} is missing since it was certified"]
    (tmp_path / "away").rename(copy / FILES[2])
    assert {one.severity for one in verify(copy)} == {"ok"}


def test_the_verbs(trained, tmp_path, capsys) -> None:
    raw, _, _ = trained
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    model = tmp_path / "model"
    assert main(["export", str(tmp_path / "c.yaml"), str(model), "--mesh", "1x2", "--mesh", "1x3"]) == 0
    assert main(["verify", str(model)]) == 0
    said = capsys.readouterr().out
    assert "ok       tensor 1, domain 3:" in said
    certificate = json.loads((model / CERTIFICATE).read_text())
    assert set(certificate["digests"]) == {"config", "statistics", "checkpoint", "code"}
    assert certificate["files"].keys() == {name for name in FILES[:-1] if (model / name).exists()}
    errors = certificate["parity"][1]["errors"]
    assert errors["output 0"] < 1e-9
    assert sum(name.startswith("parameter gradient") for name in errors) > 5
    assert main(["export", str(tmp_path / "c.yaml"), str(model)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "c.yaml"), str(tmp_path / "other"), "--mesh", "3"]) == 2


def test_code_of_others_is_imported_if_it_is_trusted(tmp_path) -> None:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), epochs=1)
    raw["model"] = {"name": "tests.training.odd_models.Odd"}
    write_statistics(parse_config(raw))
    curve(raw)
    with start_job(lambda: parse_config(raw)) as job:
        export(job, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"names code of others, tests\.training\.odd_models\.Odd"):
        hub.from_pretrained(tmp_path / "model")
    assert type(hub.from_pretrained(tmp_path / "model", trust=True).model).__name__ == "Odd"


def test_what_is_no_model_is_refused(tmp_path) -> None:
    nothing, nowhere = verify(tmp_path), verify(tmp_path / "no such place")
    assert {(one.severity, one.fix) for one in (*nothing, *nowhere)} == {
        ("error", "`credit export CONFIG DIR` writes one")
    }
    for source, said in ((tmp_path, "does not hold a model"), ("no such place", "neither a directory nor")):
        with pytest.raises(CreditError, match=said):
            hub.from_pretrained(source)
    with pytest.raises(CreditError, match="holds no model"):
        hub.push(tmp_path, "me/model")


def test_an_export_that_finds_no_checkpoint_leaves_nothing(tmp_path) -> None:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()))
    write_statistics(parse_config(raw))
    with start_job(lambda: parse_config(raw)) as job, pytest.raises(CreditError, match="no checkpoint"):
        export(job, tmp_path / "model")
    assert not (tmp_path / "model").exists()
