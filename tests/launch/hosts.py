"""Hosts for tests of the network: each with a network, a name and an /etc/hosts of its own, on one machine. Needs root.

The machine's own files stay as they are: names are read from files that are mounted over /etc/hosts for the host alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_numbers = count(os.getpid() % 1000 * 16)
ENTER = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf || exit 99
cd "$3" && shift 3 && exec "$@"
"""


def missing() -> str | None:
    """Why there can be no hosts here."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip"):
        return "there is no ip (iproute2)"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "namespaces cannot be made here"
    return None


@dataclass(frozen=True)
class Host:
    """One of them: its name, namespace, addresses by interface, and the directory of its files."""

    name: str
    space: str
    addresses: dict[str, str]
    folder: Path

    def command(self, *words: str | Path, cwd: Path) -> list[str]:
        """What runs these words there."""
        inside = [
            "nsenter",
            f"--net=/run/netns/{self.space}",
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "private",
        ]
        return [*inside, "sh", "-c", ENTER, "sh", self.name, str(self.folder), str(cwd), *map(str, words)]

    def knows(self, names: Mapping[str, str]) -> None:
        """The address of each name in its /etc/hosts."""
        lines = [f"{address} {name}" for name, address in names.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))


@contextmanager
def hosts(names: Sequence[str], folder: Path, ipv6: bool = False, networks: int = 1) -> Iterator[list[Host]]:
    """Hosts on a bridge, each on all of `networks` bridges: interfaces eth0, eth1, ...; each knows all by eth0."""
    number = next(_numbers) % 16000
    made, bridges = [], [f"cb{number}x{n}" for n in range(networks)]
    try:
        for bridge in bridges:
            ip("link", "add", "name", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            space, home = f"credit-{number}-{i}", folder / f"host{i}"
            home.mkdir()
            ip("netns", "add", space)
            addresses = {}
            made.append(Host(name, space, addresses, home))
            ip("-n", space, "link", "set", "lo", "up")
            for n, bridge in enumerate(bridges):
                address = f"fd7{n}::{10 + i}" if ipv6 else f"10.{79 + n}.0.{10 + i}"
                ip("link", "add", f"cv{number}x{n}{i}", "type", "veth", "peer", "name", f"eth{n}", "netns", space)
                ip("link", "set", f"cv{number}x{n}{i}", "master", bridge, "up")
                words = (f"{address}/64", "nodad") if ipv6 else (f"{address}/24",)
                ip("-n", space, "addr", "add", *words, "dev", f"eth{n}")
                ip("-n", space, "link", "set", f"eth{n}", "up")
                addresses[f"eth{n}"] = address
            (home / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for one in made:
            one.knows({other.name: other.addresses["eth0"] for other in made})
        yield made
    finally:
        for one in made:
            pids = subprocess.run(["ip", "netns", "pids", one.space], capture_output=True, text=True).stdout.split()
            for pid in pids:
                os.kill(int(pid), 9)
            ip("netns", "del", one.space)
        for bridge in bridges:
            subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def cut(one: Host, other: Host, interface: str = "eth0") -> None:
    """Let what `one` sends to `other` get lost, without a word, as a firewall does."""
    family = ("-6",) if ":" in other.addresses[interface] else ()
    there = (other.addresses[interface], "lladdr", "02:00:00:00:00:01", "dev", interface)
    ip("-n", one.space, *family, "neigh", "replace", *there)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
