"""What networks do to the start of a job, on hosts that are real network namespaces.   python -m tests.launch.scenarios

Prints the table scenario / expected / seen / seconds. Hosts have names, networks and an /etc/hosts of their own, see
`tests.launch.hosts`. srun's variables are set by hand here, one process a rank; torchrun is the real one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch.exits import write_short
from tests.launch.hosts import Host, cut, hosts
from tests.launch.jobs import BIN, PYTHON, ROOT, environment
from tests.table import HEAD, row

START_S = 180
BOUND_S = START_S + 120
"""After which a start that hangs is ended: its own bound, and the time in which Python and torch are loaded."""
SHORT = {"CREDIT_START_TIMEOUT": "20"}
"""Of a start that is to fail by its deadline."""
MET = r"credit: network: .*"
LEFT_S = 15
"""How long ranks run on after one has failed, before they are ended as a launcher would end them."""


@dataclass(frozen=True)
class Scenario:
    """What is wrong with the network, and what is to come of it.

    Attributes:
        expected: in words.
        says: a pattern that is found in what all ranks print together.
        code: of every rank.
        prepare: changes the hosts.
        names: of the hosts; `listed` is how the launcher's list calls them, where it is another way.
        ranks: on each host.
        torchrun: options, where torchrun starts the ranks.
        last: code that the ranks of the last host run before.
    """

    expected: str
    says: str
    code: int = 0
    prepare: Callable[[list[Host]], None] = lambda hosts: None
    names: Sequence[str] = ("n0", "n1")
    listed: Sequence[str] = ()
    ranks: int = 1
    env: dict[str, str] = field(default_factory=dict)
    ipv6: bool = False
    networks: int = 1
    apart: bool = False
    torchrun: str = ""
    last: str = ""


def debian(made: list[Host]) -> None:
    """Every host takes its own name for 127.0.1.1, and knows those of the others."""
    for one in made:
        one.knows({other.name: "127.0.1.1" if other is one else other.addresses["eth0"] for other in made})


def rename(made: list[Host], names: Sequence[str]) -> None:
    """The names that resolve are these, whatever the hosts call themselves."""
    for one in made:
        one.knows({name: other.addresses["eth0"] for name, other in zip(names, made, strict=True)})


def only_the_second_network(made: list[Host]) -> None:
    """Names are those of the first, on which nobody hears anybody; the launcher's list names the second."""
    for one in made:
        names = {other.name: other.addresses["eth0"] for other in made}
        one.knows({**names, **{f"{other.name}-hsn": other.addresses["eth1"] for other in made}})
        for other in made:
            if other is not one:
                cut(one, other)


STRANGERS = """
import socket, time
from credit.launch.rendezvous import _ports
held = []
while True:
    for port in _ports(b"%s"):
        try:
            held.append(socket.create_connection((%r, port), timeout=1))
            if len(held) %% 3 == 1:
                held[-1].sendall(b"[" * 1000)
        except OSError:
            pass
    del held[:-1000]
    time.sleep(0.001)
"""
SECRET = "0123456789abcdef0123"


def strangers(made: list[Host]) -> None:
    """A thousand at a time, from the last host, who know the port; those that are sent away come again."""
    code = STRANGERS % (SECRET, made[0].addresses["eth0"])
    subprocess.Popen(made[-1].command(PYTHON, "-c", code, cwd=ROOT))


def both_ways(one: Host, other: Host) -> None:
    cut(one, other)
    cut(other, one)


SCENARIOS: dict[str, Scenario] = {
    "nothing is wrong": Scenario(
        "starts", rf"{MET}n0 at 10\.79\.0\.10 \(eth0\), n1 at 10\.79\.0\.11 \(eth0\)", ranks=2
    ),
    "own name is 127.0.1.1": Scenario("starts", rf"{MET}n1 at 10\.79\.0\.11 \(eth0\)", prepare=debian, ranks=2),
    "own name is unknown, the list's is not": Scenario(
        "starts",
        rf"{MET}x0 at 10\.79\.0\.10 \(eth0\)",
        prepare=lambda made: rename(made, ["n0", "n1"]),
        names=("x0", "x1"),
        listed=("n0", "n1"),
        ranks=2,
    ),
    "full names in the list, short ones known": Scenario(
        "starts", rf"{MET}n0 at 10", listed=("n0.cluster.example", "n1.cluster.example")
    ),
    "IPv6 only": Scenario("starts", rf"{MET}n0 at fd70::10 \(eth0\)", ipv6=True, ranks=2),
    "names lead to a network that is cut": Scenario(
        "starts, over the other",
        rf"{MET}n0 at 10\.80\.0\.10 \(eth1\)",
        prepare=only_the_second_network,
        listed=("n0-hsn", "n1-hsn"),
        networks=2,
    ),
    "another interface is named": Scenario(
        "starts, over it", rf"{MET}n0 at 10\.80\.0\.10 \(eth1\)", env={"GLOO_SOCKET_IFNAME": "eth1"}, networks=2
    ),
    "an interface that is not there is named": Scenario(
        "refused at once",
        r"n0 does not reach n1, which has no address of GLOO_SOCKET_IFNAME=eth9",
        2,
        env={"GLOO_SOCKET_IFNAME": "eth9"},
    ),
    "no file system in common": Scenario("refused in time", "one of which all have to see", 2, apart=True, env=SHORT),
    "no file system in common, CREDIT_SECRET": Scenario(
        "starts", rf"{MET}n1 at", apart=True, env={"CREDIT_SECRET": "0123456789abcdef0123"}
    ),
    "the first host's name is unknown to others": Scenario(
        "refused in time",
        "rank 1 on n1 did not find rank 0 on n0 in time: the name does not resolve here",
        2,
        prepare=lambda made: made[1].knows({"n1": made[1].addresses["eth0"]}),
        env=SHORT,
    ),
    "a firewall before the first host": Scenario(
        "refused in time",
        "may nodes talk to each other on ports",
        2,
        prepare=lambda made: both_ways(made[0], made[1]),
        env=SHORT,
    ),
    "a firewall between two others": Scenario(
        "refused at once, naming them",
        r"n1 does not reach n2, which has 10\.79\.0\.12 \(eth0\)",
        2,
        prepare=lambda made: both_ways(made[1], made[2]),
        names=("n0", "n1", "n2"),
        env={"CREDIT_START_TIMEOUT": str(START_S)},
    ),
    "a firewall between two that are far apart": Scenario(
        "refused at once, naming them",
        r"n1 does not reach n3 at 10\.79\.0\.13 \(eth0\)",
        2,
        prepare=lambda made: both_ways(made[1], made[3]),
        names=("n0", "n1", "n2", "n3"),
    ),
    "a thousand strangers": Scenario(
        "starts",
        rf"{MET}n1 at 10\.79\.0\.11",
        prepare=strangers,
        env={"CREDIT_SECRET": SECRET},
    ),
    "a rank stands still once it has come": Scenario(
        "refused in time",
        "rank 1 came, and was not heard of again",
        2,
        last="import os, credit.launch.network as n; n.agree = lambda *a, **k: os.kill(os.getpid(), 19)",
        env={"CREDIT_START_TIMEOUT": "45"},
    ),
    "a clock an hour ahead": Scenario(
        "starts, and says so",
        r"clocks differ from that of n0, which counts: n1 by \+3600 s",
        last="import time; true = time.time; time.time = lambda: true() + 3600",
    ),
    "torchrun, own name is 127.0.1.1": Scenario(
        "starts", rf"{MET}n1 at 10\.79\.0\.11", prepare=debian, torchrun="--master-addr=n0 --node-rank={rank}"
    ),
    "torchrun with c10d, own name is 127.0.1.1": Scenario(
        "starts",
        rf"{MET}n1 at 10\.79\.0\.11",
        prepare=debian,
        torchrun="--rdzv-backend=c10d --rdzv-endpoint=n0:29555 --rdzv-id=7",
    ),
}


@dataclass(frozen=True)
class Seen:
    """What came of it: exit codes, all that was printed, and how long it took."""

    codes: list[int]
    text: str
    seconds: float

    def fits(self, scenario: Scenario) -> bool:
        said = re.search(scenario.says, self.text) is not None
        right = all(code == 0 for code in self.codes) if scenario.code == 0 else all(self.codes)
        return said and right and "Traceback" not in self.text

    def words(self, scenario: Scenario) -> str:
        """The codes, and the line that was expected or the first that was said."""
        lines = [line for line in self.text.splitlines() if line.startswith("credit: ")]
        line = next((line for line in lines if re.search(scenario.says, line)), (lines or ["nothing said"])[0])
        return f"{sorted(set(self.codes))}: {line.removeprefix('credit: ')}"


def play(scenario: Scenario, config: Path, folder: Path) -> Seen:
    """`credit layout` on the hosts of a scenario."""
    folder.mkdir()
    with hosts(scenario.names, folder, scenario.ipv6, scenario.networks) as made:
        scenario.prepare(made)
        begin = time.monotonic()
        jobs = []
        for number, host in enumerate(made):
            home = folder / (f"home{number}" if scenario.apart else "home")
            home.mkdir(exist_ok=True)
            for local in range(1 if scenario.torchrun else scenario.ranks):
                words, env = _start(scenario, number, local)
                given = environment(HOME=str(home), **{"CREDIT_START_TIMEOUT": str(START_S)}, **env)
                given |= scenario.env
                out = (folder / f"{number}.{local}").open("w")
                there = host.command(*words, "credit", "layout", config, cwd=home)
                jobs.append(subprocess.Popen(there, env=given, stdout=out, stderr=out))
        seconds = _wait(jobs) - begin
        codes = [job.wait() for job in jobs]
        text = "".join(file.read_text() for file in sorted(folder.glob("*.[0-9]")))
    return Seen(codes, text, seconds)


def _wait(jobs: list[subprocess.Popen]) -> float:
    """Until all have ended, or are ended; the time at which the last, or the first that failed, did."""
    deadline = time.monotonic() + BOUND_S
    failed = None
    while any(job.poll() is None for job in jobs):
        now = time.monotonic()
        if failed is None and any(job.poll() for job in jobs):
            failed = now
        if now > min(deadline, (failed or now) + LEFT_S):
            for job in jobs:
                job.kill()
        time.sleep(0.05)
    return failed or time.monotonic()


def _start(scenario: Scenario, node: int, local: int) -> tuple[list[str], dict[str, str]]:
    """The command before `credit`, and the variables of its launcher."""
    nodes, ranks = len(scenario.names), scenario.ranks
    if scenario.torchrun:
        options = scenario.torchrun.format(rank=node).split()
        return [str(BIN / "torchrun"), f"--nnodes={nodes}", f"--nproc-per-node={ranks}", *options, "-m"], {}
    values = {
        "JOB_ID": 7,
        "STEP_ID": 0,
        "PROCID": node * ranks + local,
        "LOCALID": local,
        "NODEID": node,
        "STEP_NODELIST": ",".join(scenario.listed or scenario.names),
        "STEP_NUM_TASKS": nodes * ranks,
        "STEP_TASKS_PER_NODE": f"{ranks}(x{nodes})",
    }
    env = {f"SLURM_{name}": str(value) for name, value in values.items()}
    if node + 1 < nodes or not scenario.last:
        return [PYTHON, "-m"], env
    return [PYTHON, "-c", f"import sys; del sys.argv[1]; {scenario.last}; from credit.__main__ import run; run()"], env


def main(*names: str) -> int:
    """Play the scenarios of these names, all by default; 1 if one does not end as expected."""
    wanted = {name: one for name, one in SCENARIOS.items() if not names or name in names}
    with tempfile.TemporaryDirectory(prefix="credit-net-") as folder, ThreadPoolExecutor(2) as pool:
        config = write_short(Path(folder))
        played = {
            name: pool.submit(play, one, config, Path(folder, f"s{number}"))
            for number, (name, one) in enumerate(wanted.items())
        }
        wrong = 0
        print("\n".join(HEAD))
        for name, future in played.items():
            seen = future.result()
            fits = seen.fits(wanted[name])
            wrong += not fits
            print(row(name, wanted[name].expected, seen.words(wanted[name]), seen.seconds, fits), flush=True)
            if not fits:
                print(seen.text, file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
