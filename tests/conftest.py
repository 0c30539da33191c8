from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import table
from tests.containers import lab
from tests.launch import cluster
from tests.ranks import World

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.getreports(kind) if one.when == "call"]
    for line in table.lines(reports):
        terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[[int], World]]:
    """worlds(n): a world of n gloo ranks, kept alive for the tests of a file."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started or not started[size].alive:
            started[size] = World(size)
        return started[size]

    yield world
    for one in started.values():
        one.close()


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session", autouse=True)
def images(request) -> Iterator[dict[str, Future]]:
    """Those that the selected tests need, built from these sources while other tests run."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    pool = ThreadPoolExecutor()
    builds = {"sif": lab.build_sif, "oci": lab.build_oci}
    yield {kind: pool.submit(build) for kind, build in builds.items() if kind in needed}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def sif(images) -> Path:
    """The Apptainer image."""
    try:
        return images["sif"].result()
    except lab.MissingError as error:
        pytest.skip(f"Apptainer images cannot be built here: {error}")


@pytest.fixture(scope="session")
def oci(images) -> str:
    """The name of the OCI image."""
    try:
        return images["oci"].result()
    except lab.MissingError as error:
        pytest.skip(f"OCI images cannot be built here: {error}")
