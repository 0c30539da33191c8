"""How tests start what is in the images, and what they compare it with."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import pytest

from tests.containers import lab
from tests.launch import cluster
from tests.launch.jobs import log
from tests.launch.stories import is_gone, with_time_enough
from tests.waiting import until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOME = Path(f"/home/{lab.USER}")
DEADLINE_S = 300
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CONFIG = "configs/quickstart.yaml"
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
# Hydra would kill the other ranks at the first that fails, and then wait for the helpers that mounted their images.
MPIEXEC = [BIN / "mpiexec", "-disable-auto-cleanup"]


def run(*command: str | Path, env: dict[str, str] | None = None, **more: str) -> subprocess.CompletedProcess:
    """stdout and stderr together; what is still there after the deadline is killed with all it started."""
    return subprocess.run(
        ["timeout", "--kill-after=10", str(DEADLINE_S), *map(str, command)],
        cwd=ROOT,
        env={**(os.environ if env is None else env), **ONE_THREAD, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def as_user(*command: str | Path, **more: str) -> subprocess.CompletedProcess:
    """As an ordinary user, without anything of this environment but what is given."""
    env = {"HOME": str(HOME), "PATH": "/usr/bin:/bin", **more}
    return run(shutil.which("runuser") or "runuser", "-u", lab.USER, "--", *command, env=env)


def in_sif(sif: Path, *words: str | Path, options: Sequence[str | Path] = ()) -> list[str | Path]:
    return ["apptainer", "--silent", "exec", *options, sif, *words]


def apptainer(
    sif: Path, *words: str | Path, options: Sequence[str | Path] = (), **more: str
) -> subprocess.CompletedProcess:
    return as_user(*in_sif(sif, *words, options=options), **more)


def from_nothing(sif: Path, bare: Path) -> subprocess.CompletedProcess:
    """What an ordinary user does in a directory of the user's own: a config from the image, and a training with it."""
    own = bare / "own"
    assert as_user("mkdir", own).returncode == 0
    begin = 'credit init quickstart && exec "$@"'
    train = [*TORCHRUN, "credit", "train", "quickstart.yaml", *shorter(bare / "sif")]
    return apptainer(sif, "sh", "-c", begin, "sh", *train, options=("--pwd", own))


def podman_run(oci: str, *options: str | Path, entrypoint: str = "credit") -> list[str]:
    """The command up to the image; the words for `entrypoint` follow."""
    options = ("--entrypoint", entrypoint, *map(str, options))
    return ["podman", "run", "--rm", "--no-healthcheck", "--volume", f"{ROOT}:/work:ro", *options, oci]


def podman(
    oci: str, *words: str | Path, entrypoint: str = "credit", options: Sequence[str | Path] = ()
) -> subprocess.CompletedProcess:
    return run(*podman_run(oci, *options, entrypoint=entrypoint), *words, env=lab.environment())


def train_bare(folder: Path) -> None:
    """The quickstart on two ranks without a container, on ten days and with half of the channels, into `bare`."""
    done = run(*[BIN / "torchrun", *TORCHRUN[1:]], "credit", "train", CONFIG, *shorter(folder / "bare", "demo"))
    assert done.returncode == 0, done.stdout
    (folder / "stats.nc").write_bytes((folder / "bare" / "stats.nc").read_bytes())


def shorter(run_directory: Path, path: str | Path = "") -> list[str]:
    """The options of such a quickstart, of the bare run's data by default."""
    data = path or run_directory.parent / "bare" / "demo.zarr"
    changes = [f"run={run_directory}", f"data.path={data}", "data.train=[2011-01-15, 2011-01-25]", "trainer.epochs=1"]
    changes += ["data.valid=[2011-05-15, 2011-05-16]", "model.width=8"]
    if not path:
        changes += [f"data.stats={run_directory.parent / 'stats.nc'}"]
    return [word for change in changes for word in ("--set", change)]


def slowly(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a quickstart that sleeps most of the time: its model is let in from outside."""
    (folder / "let_in").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/launch/slow.py", folder / "let_in")
    env = {"APPTAINERENV_PYTHONPATH": str(folder / "let_in"), "APPTAINERENV_CREDIT_TEST_STEP_S": "0.1"}
    return ["--set", "model.name=slow.SlowUNet"], env


def losses(folder: Path) -> list[str]:
    return [row["loss"] for row in log(folder)]


def same_losses(bare: Path, folder: Path, ranks: int = 2) -> None:
    """To the last digit on as many ranks, and to rounding in float32 on others."""
    wanted, found = losses(bare / "bare"), losses(folder)
    assert len(wanted) == 4
    if ranks == 2:
        assert found == wanted
    else:
        assert list(map(float, found)) == pytest.approx(list(map(float, wanted)), rel=1e-4)


def on_slurm(sif: Path, bare: Path) -> tuple[subprocess.CompletedProcess, str]:
    """Batch jobs on two nodes, a training by a site's script and a forecast of tomorrow; and what they printed."""
    env = {**cluster.env(), "CREDIT_IMAGE": str(sif), "GLOO_SOCKET_IFNAME": "", "APPTAINER_USERNS": "1", **ONE_THREAD}
    wrapped = shlex.join(map(str, ["srun", *in_sif(sif, "python", "-m", "credit", *tomorrow(bare / "sbatch"))]))
    out = bare / "sbatch.log"
    nodes = ["-N2", "--ntasks-per-node=1", "-n2", "--open-mode=append", f"--output={out}"]
    done = cluster.sbatch(*nodes, "hpc/derecho.sh", CONFIG, *shorter(bare / "sbatch"), env=env, cwd=ROOT)
    if done.returncode == 0:
        done = cluster.sbatch(*nodes, "--wrap", wrapped, env=env, cwd=ROOT)
    return done, out.read_text()


def tomorrow(folder: Path) -> list[str]:
    """The words for a forecast from the newest state, by the run in a folder."""
    return ["forecast", CONFIG, *shorter(folder), "--start", "latest", "--lead", "1d"]


def submitted(sif: Path, bare: Path) -> str:
    """submitit inside the image; stopped by the clock, requeued from outside, where scontrol is. The job's log."""
    return with_time_enough(60, partial(_submitted, sif, bare))


def _submitted(sif: Path, bare: Path, used_s: float) -> str:
    folder = bare / f"submitted-{used_s:.0f}"
    slow, more = slowly(bare)
    env = {**cluster.env(), "GLOO_SOCKET_IFNAME": "", "APPTAINER_USERNS": "1", "CREDIT_STOP_BEFORE": "60", **more}
    options = [*shorter(folder), *slow, "--set", "trainer.epochs=1000", "--set", "trainer.checkpoint_every=1000"]
    limit = ["--time", f"0:{used_s / 60 + 1:02.0f}:00"]
    where = ["--site", "generic_slurm", "--nodes", "2", "--ranks-per-node", "1", *limit]
    done = run(BIN / "credit", "submit", CONFIG, *options, *where, "--container", sif, env=env)
    job = re.match(r"job (\d+)", done.stdout)
    assert job is not None, done.stdout

    def said() -> str:
        return "".join(one.read_text() for one in (folder / "jobs").glob(f"{job[1]}_0_log.*"))

    until(lambda: "resuming from" in said() or is_gone(job[1]), "the job goes on", 2 * used_s + DEADLINE_S)
    run("scancel", job[1], env=env)
    return said()


def under_srun(oci: str, bare: Path) -> subprocess.CompletedProcess:
    env = {**cluster.env(), **lab.environment(), "GLOO_SOCKET_IFNAME": "", "CREDIT_SECRET": secrets.token_hex(16)}
    # Containers have no file system in common, in which a secret could lie.
    handed = [word for name in ("SLURM_*", "CREDIT_SECRET", "OMP_NUM_THREADS") for word in ("--env", name)]
    seen = ("--network", "host", *handed, "--volume", f"{bare}:{bare}")
    words = ["-m", "credit", "train", CONFIG, *shorter(bare / "oci-srun")]
    return run("srun", "-N2", "--ntasks-per-node=1", *podman_run(oci, *seen, entrypoint="python"), *words, env=env)


def two_apart(sif: Path, bare: Path) -> subprocess.CompletedProcess:
    """Two ranks as `mpiexec apptainer exec --containall` starts them: no variables, no processes of the host to look
    at. The one that gives up first."""
    slow, env = slowly(bare)
    alone = [*shorter(bare / "alone"), *slow, "--set", "trainer.parallelism.domain=1", "--set", "trainer.epochs=400"]
    options = ("--containall", "--pwd", str(ROOT), "--bind", f"{ROOT},{bare}")
    with ThreadPoolExecutor() as both:
        words = ["credit", "train", CONFIG, *alone]
        ranks = [both.submit(apptainer, sif, *words, options=options, **env) for _ in range(2)]
        first = next(as_completed(ranks)).result()
        call = ["pkill", "-u", lab.USER, "-f", f"credit train .*run={bare / 'alone'} "]
        assert run(*call).returncode == 0
    return first


def with_other_mpi(folder: Path, package: str) -> Path | None:
    """An environment with another MPI; None if it cannot be installed here."""
    commands = [[sys.executable, "-m", "venv", folder], [folder / "bin/pip", "-q", "install", package]]
    return None if any(run(*command).returncode for command in commands) else folder
