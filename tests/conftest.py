from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.containers import lab
from tests.launch import cluster
from tests.ranks import World

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """worlds(n): a world of n gloo ranks, kept alive for the session."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started or not started[size].alive:
            started[size] = World(size)
        return started[size]

    yield world
    for one in started.values():
        one.close()


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    reason = cluster.missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        cluster.start()
    except (OSError, subprocess.CalledProcessError, TimeoutError) as error:
        cluster.stop()
        pytest.skip(f"Slurm is installed but does not start here: {error}")
    yield
    cluster.stop()


@pytest.fixture(scope="session")
def sif() -> Path:
    """The Apptainer image, built from these sources."""
    try:
        return lab.build_sif()
    except lab.MissingError as error:
        pytest.skip(f"Apptainer images cannot be built here: {error}")


@pytest.fixture(scope="session")
def oci() -> str:
    """The name of the OCI image, built from these sources."""
    try:
        return lab.build_oci()
    except lab.MissingError as error:
        pytest.skip(f"OCI images cannot be built here: {error}")
