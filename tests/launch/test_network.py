"""Starts on networks where something is wrong: each host a network namespace, see `tests.launch.scenarios`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from credit.launch import network
from credit.launch.ranks import is_loopback
from tests.launch.ahead import Results, ahead, asked_for
from tests.launch.exits import write_short
from tests.launch.hosts import missing
from tests.launch.scenarios import SCENARIOS, play
from tests.table import tell


def test_the_kernel_tells_the_addresses_of_this_host() -> None:
    faces = network.faces()
    assert network.Face("127.0.0.1", "lo") in faces
    assert {face.interface for face in faces} <= {path.name for path in Path("/sys/class/net").iterdir()}
    offered = network.addresses()
    assert len(offered) == len({face.interface for face in faces})
    assert sorted(offered, key=is_loopback) == offered


def test_an_interface_that_is_named_is_the_only_one(monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.addresses() == ["127.0.0.1"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    assert network.addresses() == []


def test_names_are_known_in_their_short_form() -> None:
    assert "127.0.0.1" in network.resolve(["localhost.nowhere.invalid"], 10)
    assert network.resolve(["nowhere.invalid"], 10) == []


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> Iterator[Results]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("net")
    config = write_short(folder)
    todo = {name: partial(play, one, config, folder / f"s{n}") for n, (name, one) in enumerate(SCENARIOS.items())}
    with ahead(todo, asked_for(request.session, "scenario"), 2) as result:
        yield result


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_network_where_something_is_wrong(scenario, results, request) -> None:
    seen, wanted = results(scenario).value, SCENARIOS[scenario]
    tell(request.node, scenario, wanted.expected, seen.words(wanted), seen.seconds)
    assert seen.fits(wanted), f"{seen.codes} after {seen.seconds:.0f} s\n{seen.text}"
