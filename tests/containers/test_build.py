"""containers/build.sh: what it would run, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(*words: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """With `path`, only the tools in it can be found."""
    seen = {**os.environ, **env} | ({"PATH": f"{path}:/usr/bin:/bin"} if path else {})
    return subprocess.run([ROOT / "containers/build.sh", *words], env=seen, capture_output=True, text=True)


@pytest.fixture
def tools(tmp_path) -> Path:
    """Programs of these names, which are only looked for."""
    for name in ("apptainer", "singularity", "docker", "podman", "buildah"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["sif"], "apptainer build"),
        (["sif", "--tool", "singularity"], "singularity build"),
        (["oci"], "docker build"),
        (["oci", "--tool", "podman", "--arch", "arm64"], "podman build"),
    ],
)
def test_what_it_would_run(tools, words, command) -> None:
    done = build(*words, "--dry-run", path=tools, PIP_FIND_LINKS="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(command)
    assert "python:3.11-slim-bookworm" in done.stdout
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in done.stdout
    assert ("linux/arm64" in done.stdout) == ("arm64" in words)


def test_wheels_at_hand_need_no_index(tools, tmp_path) -> None:
    (tmp_path / "torch-2.13.0+cpu.whl").touch()
    done = build("sif", "--from", str(tmp_path), "--dry-run", path=tools, PIP_FIND_LINKS=str(tmp_path))
    assert "TORCH_INDEX= " in done.stdout
    assert f"BOOTSTRAP=localimage --build-arg BASE={tmp_path}" in done.stdout
    assert f"{tmp_path}:/mnt/wheels:ro" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which image: sif or oci?"),
        (["sif", "--tool", "docker"], "docker does not build a sif image; apptainer singularity do"),
        (["oci", "--bse", "x"], "there is no option --bse (--help lists them)"),
        (["oci", "--from"], "--from needs a value"),
    ],
)
def test_what_it_refuses(tools, words, message) -> None:
    done = build(*words, path=tools)
    assert done.returncode == 2
    assert f"build.sh: error: {message}" in done.stderr


def test_help_has_examples() -> None:
    assert "containers/build.sh oci --tool podman --from base.tar" in build("--help").stdout
