"""What a user of the wheel has: starter files, and the whole chain from an empty directory, without a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from credit.cli import main
from credit.config import load_config
from credit.init import config_names

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("credit", "configs", "hpc", "containers")
SHORTER = ["data.path=demo.zarr", "trainer.parallelism={data: none, domain: 1}", "data.train=[2011-01-15, 2011-01-20]"]
SHORTER += ["data.valid=[2011-01-20, 2011-01-22]", "data.test=[2011-01-22, 2011-01-26]", "model.width=8"]
SHORTER += ["trainer.epochs=1", "forecast.lead=12h", "forecast.every=4"]
CHANGES = [word for change in SHORTER for word in ("--set", change)]


def call(*words: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves files in the tree it builds from, and takes old ones for new."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return build(copy, out)


def build(sources: Path, out: Path) -> Path:
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", out]
    call(sys.executable, "-m", "pip", "wheel", *options, sources, cwd=out)
    return next(out.glob("credit_hpc-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and this one's packages but for credit."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    there = ["--python", folder / "bin/python"]
    call(sys.executable, "-m", "pip", "-q", *there, "install", "--no-deps", wheel, cwd=folder)
    packages = next(folder.glob("lib/python3*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def test_all_starter_files_come_with_the_wheel(wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "hpc", "hpc/sites", "containers"):
        for path in (ROOT / folder).iterdir():
            assert path.is_dir() or f"credit/share/{folder}/{path.name}" in names
    assert {"credit/py.typed", "credit/evaluation/coasts.npz", "credit/data/sample/era5_1deg.nc"} | {
        "credit/config/schema.json",
        "credit/evaluation/report.html",
    } <= names
    assert {name.rsplit("/")[-1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_from_an_empty_directory_to_scores(installed, tmp_path) -> None:
    call(installed / "credit", "init", "quickstart", "--site", "derecho", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quickstart.yaml", "derecho.pbs", "derecho.yaml"}
    assert (tmp_path / "derecho.pbs").read_text() == (ROOT / "hpc/derecho.pbs").read_text()
    verbs = [["data", "demo", "demo.zarr", "--states", "60"]]
    verbs += [
        [*verb, "quickstart.yaml", *CHANGES]
        for verb in (["data", "stats"], ["train"], ["forecast"], ["score"], ["report"])
    ]
    code = f"import credit; from credit.cli import main; print([main(verb) for verb in {verbs}], credit.__file__)"
    said = call(installed / "python", "-c", code, cwd=tmp_path)
    assert said.splitlines()[-1].startswith(f"[0, 0, 0, 0, 0, 0] {installed.parent}")
    assert "z500         12 h" in said
    made = {path.name for path in (tmp_path / "runs/quickstart").iterdir()}
    assert made >= {"scores.csv", "forecast.zarr", "map.png", "report.html"}


def test_an_image_is_built_from_the_sources_of_the_wheel(installed, wheel, tmp_path) -> None:
    """They make the wheel again, file for file."""
    call(installed / "credit", "init", "--container", cwd=tmp_path)
    sources = tmp_path / "credit-image"
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    path = f"PATH={tmp_path}:/usr/bin:/bin"
    said = call("env", path, sources / "containers/build.sh", "sif", "--dry-run", cwd=tmp_path)
    assert "containers/credit.def" in said
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        sources,
        cwd=tmp_path,
    )
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    given = zipfile.ZipFile(wheel)
    assert again.namelist() == given.namelist()
    for name in given.namelist():
        assert again.read(name) == given.read(name), name


@pytest.mark.parametrize("name", config_names())
def test_a_starter_config_is_the_shipped_one(name, tmp_path, monkeypatch) -> None:
    shipped = load_config(ROOT / f"configs/{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["init", name]) == 0
    assert load_config(f"{name}.yaml") == shipped


def test_nothing_is_overwritten_unless_it_is_said(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lumi.sh").write_text("mine")
    assert main(["init", "quickstart", "--site", "lumi"]) == 2
    assert "lumi.sh: there already, and nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lumi.sh"]
    assert main(["init", "quickstart", "--site", "lumi", "--force"]) == 0
    assert "#SBATCH" in Path("lumi.sh").read_text()
    assert os.access("lumi.sh", os.X_OK)


def test_what_there_is_to_start_from_is_listed(capsys) -> None:
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert "  quickstart           The embedded default: 150 days of demo weather" in said
    assert "  perlmutter           NERSC Perlmutter" in said
    assert main(["init", "wxformer"]) == 2
    assert "no config 'wxformer' to start from; did you mean wxformer_demo or" in capsys.readouterr().err


def own_site(**changes: object) -> str:
    site = yaml.safe_load((ROOT / "hpc/sites/generic_slurm.yaml").read_text())
    Path("own.yaml").write_text(yaml.safe_dump({**site, "title": "Our machine", **changes}))
    return "own.yaml"


def test_a_site_of_ones_own(tmp_path, monkeypatch, capsys) -> None:
    """Its script, a submission, a plan, and what is checked of it."""
    config = str(ROOT / "configs/quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    own_site(gpu_memory=40, queue="gpu")
    assert main(["site", "check", "own.yaml"]) == 0
    assert capsys.readouterr().out == "ok       own.yaml: slurm, 4 GPUs of 40 GB and 32 cores a node, 12:00:00\n"
    assert main(["init", "--site", "own.yaml"]) == 0
    assert "#SBATCH --partition=gpu\n" in Path("own.sh").read_text()
    capsys.readouterr()
    assert main(["submit", config, "--site", "own.yaml", "--dry-run"]) == 0
    assert "#SBATCH --partition=gpu\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"own.yaml", "own.sh"}, "showing a script writes nothing"
    assert main(["plan", config, "--site", "own.yaml"]) == 0


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"cores_per_node": 0}, "cores_per_node", "input should be greater than or equal to 1, got 0"),
        ({"colour": "red"}, "colour", "unknown key"),
        ({"queue": "a b"}, "own.yaml", "queue or constraint is 'a b', which no #SBATCH"),
        ({"launch": "srun 'x"}, "launch", "no closing quotation"),
        ({"setup": ["if true"]}, "setup", "bash cannot read the script"),
        ({"title": "a\nb"}, "title", "string should match pattern"),
        ({"env": {"A B": "x"}}, "env.A B.[key]", "string should match pattern"),
    ],
)
def test_a_wrong_site_file_is_told_by_name(changes, where, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    own_site(**changes)
    assert main(["site", "check", "own.yaml", "--json"]) == 1
    errors = [one for one in json.loads(capsys.readouterr().out) if one["severity"] == "error"]
    assert [one["where"] for one in errors] == [where]
    assert message in errors[0]["message"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1", b"", None])
def test_a_file_that_is_no_site_is_refused(content, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("own.yaml").write_bytes(content)
    assert main(["init", "--site", "own.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("credit: error: ")
    assert "own.yaml" in said
