"""What stands in several files of the project says the same."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import yaml

from credit import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ci_and_hooks_run_what_ci_run_runs() -> None:
    ours = re.findall(r"^make [\w-]+$", (ROOT / ".ci/run").read_text(), re.M)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    theirs = [step["run"] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make")]
    assert theirs == ours
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint"]


def test_versions_of_python_are_those_that_ci_tries() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    tried = [int(version.removeprefix("3.")) for version in job["strategy"]["matrix"]["python"]]
    assert PROJECT["requires-python"] == f">=3.{tried[0]},<3.{tried[-1] + 1}"
    named = [int(one) for one in re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))]
    assert named == tried == list(range(tried[0], tried[-1] + 1))


def test_the_version_is_that_of_the_citation_and_the_changes() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == __version__


def test_the_licence_is_there_and_names_the_data() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    said = (ROOT / "NOTICE").read_text()
    for path in [*(ROOT / "credit/data/sample").glob("*.nc"), ROOT / "credit/evaluation/coasts.npz"]:
        assert str(path.relative_to(ROOT)) in said


def test_what_torch_calls_private_is_used_in_two_files() -> None:
    """Private modules and names of torch; the one string is the name of a module that may have been imported."""
    private = re.compile(
        r"(?<![\x22\w])(torch|dist|dcp|nn|F|fx)(\.\w+)*\._(?!_)|from torch[\w.]*\._|from torch\S* import .*\b_\w"
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "credit").rglob("*.py")
        if any(map(private.search, path.read_text().splitlines()))
    }
    core = "credit/domain_parallel/torch_private"
    assert found == {f"{core}.py", f"{core}_recording.py"}


def test_files_and_functions_are_short() -> None:
    """Longer ones ask why: they do several things, or one that has a simpler form."""
    for path in (ROOT / "credit").rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"
