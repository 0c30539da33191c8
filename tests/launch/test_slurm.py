"""On a real Slurm of four nodes: every way of starting gives one loss curve; signals, requeues, losses and refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from credit.cli import main
from credit.config import parse_config
from credit.data.prepare import write_statistics
from tests.launch import cluster
from tests.stores import conf, dataset, write_zarr

ROOT = Path(__file__).parents[2]
PYTHON, BIN = sys.executable, Path(sys.executable).parent
DEADLINE_S = 240


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A config in float64 with its data, and the losses of one process in `serial/`."""
    folder = tmp_path_factory.mktemp("slurm")
    raw = conf(folder / "serial", write_zarr(folder / "s.zarr", dataset()))
    raw["data"]["stats"] = str(folder / "stats.nc")
    raw["trainer"].update(dtype="float64", parallelism={"data": "ddp", "domain": 2}, timeout=60)
    write_statistics(parse_config(raw))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path), "--set", "trainer.parallelism.domain=1"]) == 0
    return path


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The quickstart on six days, in float64, with its data, and the losses of one process in `serial/`."""
    folder = tmp_path_factory.mktemp("quickstart")
    raw = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    raw["run"] = str(folder / "serial")
    first, middle, last = "2011-01-21 06:00", "2011-01-22 06:00", "2011-01-23"
    raw["data"].update(train=["2011-01-15", first], valid=[first, middle], test=[middle, last])
    raw["trainer"].update(dtype="float64", epochs=1)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path), "--set", "trainer.parallelism.domain=1"]) == 0
    raw["data"].update(path=str(folder / "serial" / "demo.zarr"), stats=str(folder / "serial" / "stats.nc"))
    path.write_text(yaml.safe_dump(raw))
    assert len(losses(folder / "serial")) == 3
    return path


def environment(**more: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {name: value for name, value in cluster.env().items() if name not in dropped}
    own = {"CREDIT_VENV": str(BIN.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "", "PYTHONPATH": str(ROOT)}
    return {**env, **own, **more}


def run(*command: str | Path, timeout: float = DEADLINE_S, **more: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    given: dict[str, Any] = {"cwd": ROOT, "env": environment(**more), "stderr": subprocess.STDOUT}
    if words[0] == "sbatch" and "--parsable" not in words:
        done = cluster.sbatch(*words[1:], seconds=timeout, **given)
    else:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=timeout, **given)
    print(done.stdout)
    return done


def losses(folder: Path) -> list[tuple[str, float]]:
    with (folder / "log.csv").open(newline="") as stream:
        return [(row["step"], float(row["loss"])) for row in csv.DictReader(stream)]


def same_curve(base: Path, folder: Path) -> None:
    wanted, found = losses(base.parent / "serial"), losses(folder)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-9)


def torchrun(nodes: int, rank: str = "0", ranks: int = 4) -> list[str]:
    """One torchrun a node, of that many ranks in all."""
    where = [f"--node-rank={rank}", "--master-addr=n0", "--master-port=29577"] if nodes > 1 else ["--standalone"]
    return [str(BIN / "torchrun"), f"--nnodes={nodes}", f"--nproc-per-node={ranks // nodes}", *where, "-m"]


TWO_BY_TWO = ["-N2", "--ntasks-per-node=2", "-n4"]
WAYS: dict[str, list[str]] = {
    "sbatch, 2 nodes x 2": ["sbatch", *TWO_BY_TWO, "hpc/derecho.sh", "CONFIG"],
    "sbatch, cyclic": ["sbatch", *TWO_BY_TWO, "--distribution=cyclic", "hpc/derecho.sh", "CONFIG"],
    "sbatch, 4 nodes x 2": ["sbatch", "-N4", "--ntasks-per-node=2", "hpc/generic_slurm.sh", "CONFIG"],
    "srun": ["srun", *TWO_BY_TWO, PYTHON, "-m", "credit", "train", "CONFIG"],
    "srun with PMI": ["srun", *TWO_BY_TWO, "--mpi=pmi2", PYTHON, "-m", "credit", "train", "CONFIG"],
    "srun and torchrun": [
        *["srun", "-N2", "--ntasks-per-node=1", "bash", "-c"],
        " ".join([*torchrun(2, "$SLURM_NODEID"), "credit", "train", "CONFIG", "OPTIONS"]),
    ],
    "mpiexec": [str(BIN / "mpiexec"), "-n", "4", PYTHON, "-m", "credit", "train", "CONFIG"],
    "torchrun": [*torchrun(1), "credit", "train", "CONFIG"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_launcher_gives_the_curve_of_one_process(slurm, quickstart: Path, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "run"
    options = ["--set", f"run={folder}"]
    command = [word.replace("CONFIG", str(quickstart)).replace("OPTIONS", " ".join(options)) for word in WAYS[way]]
    if command[0] == "sbatch":
        command[1:1] = [f"--output={tmp_path}/job.log"]
    done = run(*command, *([] if "OPTIONS" in WAYS[way][-1] else options))
    assert done.returncode == 0, (tmp_path / "job.log").read_text() if command[0] == "sbatch" else done.stdout
    same_curve(quickstart, folder)


@pytest.mark.parametrize("site", ["generic_slurm", "local"])
def test_a_job_submitted_from_python(slurm, quickstart: Path, tmp_path: Path, site: str) -> None:
    """By a process that never imports torch, as on a login node."""
    code = (
        "import sys; from credit.launch import submit\n"
        f"s = submit({str(quickstart)!r}, site={site!r}, nodes={2 if site != 'local' else 1},\n"
        f"    ranks_per_node={2 if site != 'local' else 4}, changes=['run={tmp_path}/run'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(s, flush=True)\n"
        "import time; end = time.time() + 150\n"
        "from pathlib import Path\n"
        f"status = Path('{tmp_path}/run/status.json')\n"
        "finished = lambda: status.exists() and 'finished' in status.read_text()\n"
        "failed = lambda: list(Path(s.log.parent).glob('*_result.pkl')) and not finished()\n"
        "while time.time() < end and not finished() and not failed(): time.sleep(0.5)\n"
    )
    done = run(PYTHON, "-c", code)
    assert done.returncode == 0
    assert re.search(r"job \d+, log /.*_log.out", done.stdout)
    same_curve(quickstart, tmp_path / "run")


def weights(folder: Path, config: Path, options: list[str]) -> dict[str, torch.Tensor]:
    path = folder / "weights.pt"
    changes = ["--set", f"run={folder}", "--set", "trainer.parallelism.domain=1"]
    assert main(["export", str(config), str(path), *changes, *options]) == 0
    return torch.load(path)


def bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TRAINING_S = 20
"""How long the runs are that something happens to."""


class Long(NamedTuple):
    startup_s: float
    options: list[str]
    steps: int
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def long(slurm, base: Path, tmp_path_factory) -> Long:
    """A run of `TRAINING_S` on 2 nodes x 1 rank, at the speed of this machine, and what it ends with if undisturbed."""
    folder = tmp_path_factory.mktemp("long")
    command = ["srun", "-N2", "-n2", PYTHON, "-m", "credit", "train", base, "--set"]
    begin = time.monotonic()
    assert run(*command, f"run={folder}/short").returncode == 0
    startup_s = time.monotonic() - begin
    with (folder / "short" / "log.csv").open(newline="") as stream:
        each = statistics.median(float(row["seconds"]) for row in csv.DictReader(stream))
    epochs = max(int(TRAINING_S / each / 5), 12)
    options = ["--set", f"trainer.epochs={epochs}", "--set", "trainer.checkpoint_every=20"]
    assert run(*command, f"run={folder}/long", *options).returncode == 0
    return Long(startup_s, options, 5 * epochs, weights(folder / "long", base, options))


def submitted(base: Path, folder: Path, long: Long, *options: str, **env: str) -> str:
    """Hand the long run in on 2 nodes x 1 rank; the job's number."""
    log = folder / "job.log"
    more = ["-N2", "-n2", "--ntasks-per-node=1", f"--output={log}", *options]
    words = ["hpc/generic_slurm.sh", base, "--set", f"run={folder}", *long.options]
    done = run("sbatch", "--parsable", *more, *words, **env)
    assert done.returncode == 0
    return done.stdout.strip()


def until(condition, what: str, timeout: float = DEADLINE_S) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def steps_done(folder: Path) -> int:
    return len(losses(folder)) if (folder / "log.csv").exists() else 0


def state(folder: Path) -> str:
    file = folder / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else "none"


def ranks_of(config: Path) -> list[int]:
    """Processes of the training that runs, not those of shells and srun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"credit" in words and b"train" in words and str(config).encode() in words and b"python" in words[0]:
            found.append(int(process.name))
    return sorted(found)


def test_a_time_limit_in_mid_epoch(slurm, base, long, tmp_path) -> None:
    """One minute, of which some seconds are used; the job chains itself."""
    keep = max(60 - 2 * long.startup_s - TRAINING_S / 4, 5)
    submitted(base, tmp_path, long, "--time=1", CREDIT_STOP_BEFORE=f"{keep:.0f}")
    until(lambda: state(tmp_path) == "finished", "the epochs are done", 2 * DEADLINE_S)
    log = (tmp_path / "job.log").read_text()
    stopped = re.findall(rf"credit: stopped: at step (\d+) of {long.steps} by CREDIT_STOP_AT, and saved", log)
    resumed = re.findall(r"resuming from .*step-(\d+)", log)
    assert [int(step) for step in stopped if int(step)] == [int(step) for step in resumed]
    assert resumed
    assert bitwise(weights(tmp_path, base, long.options), long.weights)


def test_a_job_that_is_too_short_ends_instead_of_going_in_circles(slurm, base, tmp_path) -> None:
    out = f"--output={tmp_path}/out"
    done = run("sbatch", "-N1", "-n2", "--time=1", out, "hpc/generic_slurm.sh", base, "--set", f"run={tmp_path}/run")
    assert done.returncode == 2
    assert "the job's time is up (CREDIT_STOP_AT) before its first step" in (tmp_path / "out").read_text()


def test_a_node_that_crashes_and_a_job_that_is_requeued(slurm, base, long, tmp_path) -> None:
    """First `scontrol requeue`, then the second node dies with all its processes; Slurm starts the job again."""
    job = submitted(base, tmp_path, long, "--exclude=n3")
    until(lambda: steps_done(tmp_path) > 10, "steps are done")
    run("scontrol", "requeue", job)
    before = steps_done(tmp_path)
    until(lambda: "resuming from" in (tmp_path / "job.log").read_text(), "the job resumes")
    until(lambda: steps_done(tmp_path) > before, "more steps are done")
    nodes = run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip()
    cluster.crash_node("n1" if "1" in nodes else "n2")
    try:
        until(lambda: state(tmp_path) == "finished", "the epochs are done")
    finally:
        cluster.start_node("n1" if "1" in nodes else "n2")
    assert bitwise(weights(tmp_path, base, long.options), long.weights)


def test_a_cancelled_job_has_saved(slurm, base, long, tmp_path) -> None:
    job = submitted(base, tmp_path, long)
    until(lambda: steps_done(tmp_path) > 10, "steps are done")
    run("scancel", job)
    until(lambda: state(tmp_path) == "stopped", "the job has saved", 30)
    until(lambda: not run("squeue", "-h", "-j", job).stdout.strip().startswith(job), "the job is gone", 30)
    done = run("srun", "-N2", "-n2", PYTHON, "-m", "credit", "train", base, "--set", f"run={tmp_path}", *long.options)
    assert "resuming from" in done.stdout
    assert bitwise(weights(tmp_path, base, long.options), long.weights)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_rank_that_is_lost_ends_the_job_and_is_named(slurm, base, tmp_path, how) -> None:
    options = ["--set", "trainer.epochs=1000", "--set", f"run={tmp_path}", "--set", "trainer.timeout=10"]
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(
            ["srun", "-N2", "-n2", "--wait=3", PYTHON, "-m", "credit", "train", str(base), *options],
            **{"stdout": out, "stderr": out, "cwd": ROOT, "env": environment()},
        )
    until(lambda: steps_done(tmp_path) > 10, "steps are done")
    second = [pid for pid in ranks_of(base) if b"SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(second) == 1
    os.kill(second[0], how)
    assert job.wait(60) != 0  # the peers' timeout, their roll call, and srun's wait: 10 + 10 + 3
    assert "rank 1 on n1 (dp 0, tp 0, domain 1) does not answer" in (tmp_path / "out").read_text()
    assert "go on from the newest checkpoint" in (tmp_path / "out").read_text()


REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "MPI singleton": (
        ["srun", *TWO_BY_TWO, "--mpi=none", PYTHON, "-m", "credit", "layout", "CONFIG"],
        {"CREDIT_LAUNCHER": "mpi"},
        "MPI says that this is rank 0 of 1, but CREDIT_LAUNCHER started 4",
    ),
    "double launch": (
        ["srun", *TWO_BY_TWO, *torchrun(1, ranks=1), "credit", "layout", "CONFIG"],
        {},
        "double launch: srun started 2 processes on this node, and each started torchrun, which starts 1 more",
    ),
    "nodes apart": (
        ["srun", "-N2", "--ntasks-per-node=1", *torchrun(1, ranks=1), "credit", "layout", "CONFIG"],
        {},
        "srun started torchrun on 2 nodes, but torchrun makes a world of 1: the nodes would train apart",
    ),
    "loopback master": (
        [
            *["srun", "-N2", "--ntasks-per-node=1", "bash", "-c"],
            " ".join([*torchrun(2, "$SLURM_NODEID"), "credit", "layout", "CONFIG"]).replace("=n0", "=127.0.0.1"),
        ],
        {},
        "MASTER_ADDR is 127.0.0.1, which every node takes for itself, but there are several nodes",
    ),
    "no srun": (
        ["sbatch", "-N2", "-n4", "--output=OUT", "--wrap", f"{PYTHON} -m credit layout CONFIG"],
        {},
        "has 4 tasks, but this process was started without srun",
    ),
    "variables lost under srun": (
        ["srun", *TWO_BY_TWO, "env", "-i", f"PYTHONPATH={ROOT}", PYTHON, "-m", "credit", "layout", "CONFIG"],
        {},
        "but its variables did not get here, so every rank would train alone: a container's --cleanenv drops SLURM_*",
    ),
    "variables lost under mpiexec": (
        [
            str(BIN / "mpiexec"),
            "-n",
            "2",
            "env",
            "-i",
            f"PYTHONPATH={ROOT}",
            PYTHON,
            "-m",
            "credit",
            "layout",
            "CONFIG",
        ],
        {},
        "mpiexec started this process (hydra_pmi_proxy), but its variables did not get here",
    ),
    "a node missing": (
        ["srun", *TWO_BY_TWO, "bash", "-c", f"[ $SLURM_NODEID = 1 ] || {PYTHON} -m credit layout CONFIG"],
        {"CREDIT_START_TIMEOUT": "8"},
        "2 of 4 ranks did not come in time: 2, 3; those on n0 did",
    ),
    "worlds apart": (
        [
            "srun",
            "-N1",
            "-n2",
            "bash",
            "-c",
            f"SLURM_STEP_NUM_TASKS=$((2+SLURM_PROCID)) {PYTHON} -m credit layout CONFIG",
        ],
        {},
        "the ranks do not agree on the world: 2 came, but rank 1 on n",
    ),
    "another config on one host": (
        ["srun", "-N2", "-n2", "bash", "-c", f"{PYTHON} -m credit layout CONFIG --set trainer.seed=$SLURM_NODEID"],
        {},
        "the ranks do not agree on config: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_true_is_refused(slurm, base, tmp_path, case) -> None:
    command, env, message = REFUSED[case]
    out = tmp_path / "out"
    words = [word.replace("CONFIG", str(base)).replace("OUT", str(out)) for word in command]
    done = run(*words, **env)
    text = done.stdout + (out.read_text() if out.exists() else "")
    assert done.returncode != 0
    assert message in text
    assert "credit: error: " in text


def test_the_layout_of_a_cyclic_job_is_that_of_a_block(slurm, base) -> None:
    tables = [
        run("srun", *TWO_BY_TWO, f"--distribution={kind}", PYTHON, "-m", "credit", "layout", base).stdout
        for kind in ("block", "cyclic")
    ]
    assert tables[0] == tables[1]
    rows = [line.split() for line in tables[0].splitlines()[1:]]
    assert rows == [[str(r), f"n{r // 2}", "cpu", str(r // 2), "0", str(r % 2)] for r in range(4)]


def test_a_group_that_leaves_its_node_is_reported(slurm, base) -> None:
    done = run("srun", "-N2", "-n2", PYTHON, "-m", "credit", "layout", base)
    assert "warning: 1 of 1 domain groups straddle nodes (ranks 0 to 1: n0, n1)" in done.stdout
    assert "a replica has 2 ranks and a node 1" in done.stdout


def test_mpi_is_there() -> None:
    """The wheels of the test extra: without them the tests above would test less."""
    assert shutil.which("mpiexec", path=BIN)
