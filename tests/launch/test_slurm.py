"""On a real Slurm of seven nodes: every way of starting gives one loss curve; signals, requeues, losses and refusals.

What the tests look at is run ahead of them, several jobs at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest
import torch

from tests.launch.ahead import ahead, asked_for
from tests.launch.jobs import (
    BIN,
    PYTHON,
    ROOT,
    bitwise,
    run,
    same_curve,
    state,
    torchrun,
    training_s,
    weights,
    write_base,
)
from tests.launch.stories import LONG, ODD, STEPS, Array, lose_a_rank, reach_the_time_limit, run_an_array, suffer, train
from tests.table import tell

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
AT_A_TIME = 5


class Place(NamedTuple):
    """Where a test's jobs run: their config, and a directory of their own."""

    base: Path
    folder: Path


class Found(NamedTuple):
    """What became of them, and the seconds that they took."""

    place: Place
    result: Any
    seconds: float

    def text(self) -> str:
        """All that a command and its batch job printed."""
        file = self.place.folder / "out"
        return self.result.stdout + (file.read_text() if file.exists() else "")

    def words(self) -> str:
        """An exit code or a count, and the last that credit said."""
        if isinstance(self.result, CompletedProcess):
            code, text = self.result.returncode, self.text()
        elif isinstance(self.result, Array):
            code, text = self.result.broken.returncode, f"{self.result.log}{self.result.broken.stdout}"
        else:
            code, text = self.result if isinstance(self.result, tuple) else ("", str(self.result))
        said = [line for line in text.splitlines() if line.startswith("credit: ")]
        return f"{code} {said[-1].removeprefix('credit: ') if said else ''}"


def command(words: list[str], place: Place, **env: str) -> CompletedProcess:
    """Run it, with the words CONFIG, OUT and RUN replaced."""
    replaced = {"CONFIG": str(place.base), "OUT": f"{place.folder}/out", "RUN": f"{place.folder}/run"}
    for old, new in replaced.items():
        words = [word.replace(old, new) for word in words]
    return run(*words, **env)


PAIR = ["-N2", "-w", "n0,n1"]
TWO_BY_TWO = [*PAIR, "--ntasks-per-node=2", "-n4"]
OPTIONS = ["CONFIG", "--set", "run=RUN"]
TRAIN = ["credit", "train", *OPTIONS]
LAYOUT = [PYTHON, "-m", "credit", "layout", "CONFIG"]
WAYS: dict[str, list[str]] = {
    "sbatch, 2 nodes x 2": ["sbatch", *TWO_BY_TWO, "--output=OUT", "hpc/derecho.sh", *OPTIONS],
    "sbatch, cyclic": ["sbatch", *TWO_BY_TWO, "--distribution=cyclic", "--output=OUT", "hpc/derecho.sh", *OPTIONS],
    "sbatch, 4 nodes x 2": ["sbatch", "-N4", "--ntasks-per-node=2", "--output=OUT", "hpc/generic_slurm.sh", *OPTIONS],
    "srun": ["srun", *TWO_BY_TWO, PYTHON, "-m", *TRAIN],
    "srun with PMI": ["srun", *TWO_BY_TWO, "--mpi=pmi2", PYTHON, "-m", *TRAIN],
    "srun and torchrun": [
        *["srun", *PAIR, "--ntasks-per-node=1", "bash", "-c"],
        " ".join([*torchrun(2, "$SLURM_NODEID"), *TRAIN]),
    ],
    "mpiexec": [str(BIN / "mpiexec"), "-n", "4", PYTHON, "-m", *TRAIN],
    "torchrun": [*torchrun(1), *TRAIN],
}

# What is refused: the command, more of its environment, and what it says.
REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "MPI singleton": (
        ["srun", *TWO_BY_TWO, "--mpi=none", *LAYOUT],
        {"CREDIT_LAUNCHER": "mpi"},
        "MPI says that this is rank 0 of 1, but CREDIT_LAUNCHER started 4",
    ),
    "double launch": (
        ["srun", *TWO_BY_TWO, *torchrun(1, ranks=1), "credit", "layout", "CONFIG"],
        {},
        "double launch: srun started 2 processes on this node, and each started torchrun, which starts 1 more",
    ),
    "nodes apart": (
        ["srun", *PAIR, "--ntasks-per-node=1", *torchrun(1, ranks=1), "credit", "layout", "CONFIG"],
        {},
        "srun started torchrun on 2 nodes, but torchrun makes a world of 1: the nodes would train apart",
    ),
    "loopback master": (
        [
            *["srun", *PAIR, "--ntasks-per-node=1", "bash", "-c"],
            " ".join([*torchrun(2, "$SLURM_NODEID", master="127.0.0.1:29578"), "credit", "layout", "CONFIG"]),
        ],
        {},
        "MASTER_ADDR is 127.0.0.1, which every node takes for itself, but there are several nodes",
    ),
    "no srun": (
        ["sbatch", "-N2", "-n4", "--output=OUT", "--wrap", " ".join(LAYOUT)],
        {},
        "has 4 tasks, but this process was started without srun",
    ),
    "variables lost under srun": (
        ["srun", *TWO_BY_TWO, "env", "-i", f"PYTHONPATH={ROOT}", *LAYOUT],
        {},
        "but its variables did not get here, so every rank would train alone: a container's --cleanenv drops SLURM_*",
    ),
    "variables lost under mpiexec": (
        [str(BIN / "mpiexec"), "-n", "2", "env", "-i", f"PYTHONPATH={ROOT}", *LAYOUT],
        {},
        "mpiexec started this process (hydra_pmi_proxy), but its variables did not get here",
    ),
    "a node missing": (
        ["srun", *TWO_BY_TWO, "bash", "-c", f"[ $SLURM_NODEID = 1 ] || {' '.join(LAYOUT)}"],
        {"CREDIT_START_TIMEOUT": "8"},
        "2 of 4 ranks did not come in time: 2, 3; those on n0 did",
    ),
    "worlds apart": (
        ["srun", "-N1", "-n2", "bash", "-c", f"SLURM_STEP_NUM_TASKS=$((2+SLURM_PROCID)) {' '.join(LAYOUT)}"],
        {},
        "the ranks do not agree on the world: 2 came, but rank 1 on n",
    ),
    "another config on one host": (
        ["srun", "-N2", "-n2", "bash", "-c", f"{' '.join(LAYOUT)} --set trainer.seed=$SLURM_NODEID"],
        {},
        "the ranks do not agree on config: ",
    ),
}

SHORT = ["sbatch", "-N1", "-n2", "--time=1", "--output=OUT", "hpc/generic_slurm.sh", *OPTIONS]


SUBMITTED = ("generic_slurm", "local")
EXPECTED: dict[str, str] = {
    "time limit": "saves, is put back, ends with the weights of the undisturbed run",
    "requeue, crash, cancel": "resumes after each, ends with the weights of the undisturbed run",
    "array": "odd names hold; the task that stopped goes on alone; the broken one ends",
    **dict.fromkeys(("SIGSTOP", "SIGKILL"), "ends in time, naming rank and host"),
    **dict.fromkeys(WAYS, "the curve of one process"),
    **{f"submit, {site}": "the curve of one process" for site in SUBMITTED},
    **dict.fromkeys(REFUSED, "refused"),
    "layouts": "those of a cyclic and a block job are the same",
    "one rank a node": "a group that leaves its node is reported",
    "too short": "ends after one start",
}
"""Of each piece of work, in words."""
NAME = 'it\'s a "run", of $(touch evil)'  # all that an #SBATCH line can carry


def submitted_from_python(site: str, place: Place) -> CompletedProcess:
    """By a process that never imports torch, as on a login node."""
    folder = f"{place.folder}/{NAME}"
    code = (
        "import sys; from credit.launch import submit\n"
        f"s = submit({str(place.base)!r}, site={site!r}, nodes={2 if site != 'local' else 1},\n"
        f"    ranks_per_node={2 if site != 'local' else 4}, changes={[f'run={json.dumps(folder)}']})\n"
        "assert 'torch' not in sys.modules\n"
        "print(s, flush=True)\n"
        "import time; end = time.time() + 150\n"
        "from pathlib import Path\n"
        f"status = Path({folder!r}, 'status.json')\n"
        "finished = lambda: status.exists() and 'finished' in status.read_text()\n"
        "failed = lambda: list(Path(s.log.parent).glob('*_result.pkl')) and not finished()\n"
        "while time.time() < end and not finished() and not failed(): time.sleep(0.5)\n"
    )
    return run(PYTHON, "-c", code)


def layouts(place: Place) -> list[str]:
    """The tables of a block and of a cyclic job."""
    kinds = ("block", "cyclic")
    return [command(["srun", "-Q", *TWO_BY_TWO, f"--distribution={kind}", *LAYOUT], place).stdout for kind in kinds]


class Long(NamedTuple):
    """The long run undisturbed: how long it took to start, and what it ended with."""

    startup_s: float
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def long(slurm, base, tmp_path_factory) -> Long:
    folder = tmp_path_factory.mktemp("long")
    begin = time.monotonic()
    done = train(base, folder)
    took = time.monotonic() - begin
    assert done.returncode == 0, done.stdout
    return Long(took - training_s(folder), weights(folder, base, LONG))


Work = dict[str, Callable[[Place], Any]]


def work(long: Long) -> Work:
    """All that tests look at, by name. The longest first."""
    return {
        "time limit": lambda place: reach_the_time_limit(*place, startup_s=long.startup_s),
        "requeue, crash, cancel": lambda place: suffer(*place),
        "array": lambda place: run_an_array(*place),
        "SIGSTOP": lambda place: lose_a_rank(*place, how=signal.SIGSTOP),
        "SIGKILL": lambda place: lose_a_rank(*place, how=signal.SIGKILL),
        **{way: partial(command, words) for way, words in WAYS.items()},
        **{f"submit, {site}": partial(submitted_from_python, site) for site in SUBMITTED},
        **{case: partial(command, words, **env) for case, (words, env, _) in REFUSED.items()},
        "layouts": layouts,
        "one rank a node": partial(command, ["srun", *PAIR, "-n2", *LAYOUT]),
        "too short": partial(command, SHORT),
    }


@pytest.fixture(scope="module")
def results(slurm, base, long, request, tmp_path_factory) -> Iterator[Callable[[str], Found]]:
    """Of the work that the selected tests look at."""
    places = {name: Place(base, tmp_path_factory.mktemp("job")) for name in work(long)}
    todo = {name: partial(do, places[name]) for name, do in work(long).items()}
    with ahead(todo, asked_for(request.session, "found"), AT_A_TIME) as result:
        yield lambda name: Found(places[name], *result(name))


@pytest.fixture
def found(request, results) -> Found:
    """What became of the work that the parameter names."""
    found = results(request.param)
    tell(request.node, request.param, EXPECTED[request.param], found.words(), found.seconds)
    print(found.text() if isinstance(found.result, CompletedProcess) else found.result)
    return found


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", names, indirect=True)


@of(*WAYS)
def test_every_launcher_gives_the_curve_of_one_process(found) -> None:
    assert found.result.returncode == 0, found.text()
    same_curve(found.place.base, found.place.folder / "run")


@of("submit, generic_slurm", "submit, local")
def test_a_job_submitted_from_python(found) -> None:
    assert found.result.returncode == 0
    assert re.search(r"job \d+, log /.*_log.out", found.result.stdout)
    same_curve(found.place.base, found.place.folder / NAME)


@of(*REFUSED)
def test_what_cannot_be_true_is_refused(found, request) -> None:
    assert found.result.returncode != 0
    assert REFUSED[request.node.callspec.params["found"]][2] in found.text()
    assert "credit: error: " in found.text()


@of("layouts")
def test_the_layout_of_a_cyclic_job_is_that_of_a_block(found) -> None:
    block, cyclic = found.result
    assert block == cyclic
    network, _, *table = block.splitlines()
    assert re.fullmatch(r"credit: network: n0 at (\S+) \((\S+)\), n1 at \1 \(\2\)", network)
    rows = [line.split() for line in table]
    assert rows == [[str(r), f"n{r // 2}", "cpu", str(r // 2), "0", str(r % 2)] for r in range(4)]


@of("one rank a node")
def test_a_group_that_leaves_its_node_is_reported(found) -> None:
    assert "warning: 1 of 1 domain groups straddle nodes (ranks 0 to 1: n0, n1)" in found.result.stdout
    assert "a replica has 2 ranks and a node 1" in found.result.stdout


@of("too short")
def test_a_job_that_is_too_short_ends_instead_of_going_in_circles(found) -> None:
    assert found.result.returncode == 2
    assert "the job's time is up (CREDIT_STOP_AT) before its first step" in found.text()


@of("SIGKILL", "SIGSTOP")
def test_a_rank_that_is_lost_ends_the_job_and_is_named(found) -> None:
    code, said = found.result
    assert code != 0
    assert "rank 1 on n1 (dp 0, tp 0, domain 1) does not answer" in said
    assert "go on from the newest checkpoint" in said


@of("time limit")
def test_a_time_limit_in_mid_epoch(found, long) -> None:
    assert state(found.place.folder) == "finished"
    stopped = re.findall(rf"credit: stopped: at step (\d+) of {STEPS} by CREDIT_STOP_AT, and saved", found.result)
    resumed = re.findall(r"resuming from .*step-(\d+)", found.result)
    assert [int(step) for step in stopped if int(step)] == [int(step) for step in resumed]
    assert resumed
    assert bitwise(weights(found.place.folder, found.place.base, LONG), long.weights)


@of("requeue, crash, cancel")
def test_what_is_put_back_crashes_and_is_cancelled_ends_with_the_weights_of_the_undisturbed(found, long) -> None:
    assert "resuming from" in found.result
    assert bitwise(weights(found.place.folder, found.place.base, LONG), long.weights)


def hosts_of_stopped_tasks(log: str) -> dict[int, str]:
    """By what srun says of them."""
    placed = {}
    for host, tasks in re.findall(r"srun: error: (\w+): tasks? ([\d,-]+): Exited with exit code 75", log):
        for part in tasks.split(","):
            first, _, last = part.partition("-")
            placed |= dict.fromkeys(range(int(first), int(last or first) + 1), host)
    return placed


@of("array")
def test_tasks_of_an_array_with_odd_names_go_on_one_by_one(found) -> None:
    """And each is the curve of one process, on 3 + 1 ranks."""
    assert found.result.restarts == [0, 1]
    placed = hosts_of_stopped_tasks(found.result.log)
    assert placed[0] == placed[1] == placed[2] != placed[3]
    for task in range(2):
        same_curve(found.place.base, found.place.folder / f"{ODD} {task}")
    assert not [path for path in (ROOT, found.place.folder) if (path / "evil").exists()]


@of("array")
def test_a_job_that_fails_before_its_first_step_ends_though_an_earlier_run_was_stopped(found) -> None:
    assert state(found.place.folder / "broken") == "stopped"
    assert found.result.broken.returncode == 2
    assert found.result.broken.stdout.count("credit: error: ") == 1
    assert "3 ranks do not divide into replicas" in found.result.broken.stdout


def test_mpi_is_there() -> None:
    """The wheels of the test extra: without them the tests above would test less."""
    assert shutil.which("mpiexec", path=BIN)
