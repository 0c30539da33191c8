"""`credit doctor`: is this machine, environment or container fit to run in? Without a GPU and on a login node, too."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from credit import __version__
from credit.container import PREFIX, image
from credit.errors import LaunchError
from credit.findings import Finding
from credit.launch.network import faces
from credit.launch.ranks import claims, gpus_of_job, is_loopback

DISTRIBUTION = "credit-hpc"
SHM_BYTES = 64 * 2**20
"""Docker's default for /dev/shm is as much, and too little for data loading with workers."""


def examine() -> list[Finding]:
    """All findings; none of them stops the others."""
    parts = (versions, _launcher, _mpi, _network, devices, _processors, _shared_memory, _caches, _leaks, _owners)
    return [finding for part in parts for finding in _found(part)]


def _found(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A broken package, which may be what somebody asks the doctor about, must not silence the rest."""
    try:
        yield from part()
    except Exception as error:
        yield Finding("error", part.__name__.lstrip("_"), f"could not be looked at: {type(error).__name__}: {error}")


def versions() -> Iterator[Finding]:
    names = ("torch", "numpy", "mpi4py", "submitit", "xarray", "zarr")
    listed = [f"credit {__version__}", f"Python {platform.python_version()} ({sys.executable})"]
    for name in names:
        try:
            listed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", "versions", f"{name} is not installed", f"pip install {DISTRIBUTION}")
    yield Finding("ok", "versions", ", ".join(listed))


def _launcher() -> Iterator[Finding]:
    try:
        found = claims()
    except LaunchError as error:
        yield Finding("error", "launcher", str(error))
        return
    said = "; ".join(f"{claim.said_by}: rank {claim.rank} of {claim.size}" for claim in found)
    yield Finding("ok", "launcher", said or "none: a single process")


def _mpi() -> Iterator[Finding]:
    """In a process of its own, which an unfit library may abort."""
    code = (
        "from mpi4py import MPI; v = MPI.Get_library_version().splitlines()[0].strip(' \\0');"
        "print(v, '|', MPI.COMM_WORLD.size)"
    )
    ours = ("PMI", "OMPI_", "PMIX", "MPI_", "SLURM_", "PALS_", "HYDRA")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        yield Finding("warning", "mpi", "MPI did not start in 60 s", "start ranks with srun or torchrun")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("warning", "mpi", f"cannot be loaded: {last}", "ranks can be started by srun or torchrun")
        return
    library, _, size = done.stdout.strip().rpartition("|")
    yield Finding("ok", "mpi", f"{library.strip()}, world of {size.strip()} without a launcher")


def _network() -> Iterator[Finding]:
    interfaces = sorted(path.name for path in Path("/sys/class/net").glob("*"))
    named = f"interfaces {', '.join(interfaces)}"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = [name for name in os.environ.get(variable, "").lstrip("=^").split(",") if name]
        missing = [name for name in wanted if not any(one.startswith(name) for one in interfaces)]
        if missing:
            fix = f"unset it, or take one of {', '.join(interfaces)}"
            yield Finding("error", "network", f"{variable} names {', '.join(missing)}, which is not here", fix)
    reached = [f"{one.address} ({one.interface})" for one in faces() if not is_loopback(one.address)]
    if not reached:
        fix = "ranks on several nodes need another"
        yield Finding("warning", "network", f"there are loopback addresses only; {named}", fix)
        return
    name = socket.gethostname()
    try:
        own = f"{name} is {socket.getaddrinfo(name, None)[0][4][0]}"
    except OSError:
        own = f"the host name {name} does not resolve"
    else:
        own += ", a loopback address" if is_loopback(name) else ""
    yield Finding("ok", "network", f"{own}; ranks on several nodes try {', '.join(reached)}; {named}")


def devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Finding("ok", "devices", f"{torch.cuda.device_count()} x {', '.join(names)}")
        return
    driver = next((path for path in ("/dev/nvidiactl", "/dev/kfd") if Path(path).exists()), None)
    found = f"there is {driver}" if driver else gpus_of_job()
    if found:
        build = torch.version.cuda or torch.version.hip
        fix = "start the container with --nv (NVIDIA) or --rocm (AMD)" if image() else "look at nvidia-smi or rocm-smi"
        fix = fix if build else f"install torch for GPUs, or take an image with it: {torch.__version__} is for the CPU"
        yield Finding("error", "devices", f"{found}, but torch {torch.__version__} sees no GPU", fix)
        return
    yield Finding("ok", "devices", "no GPU: ranks compute on the CPU")


def _processors() -> Iterator[Finding]:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("ok", "processors", f"{usable} of {there} usable, OMP_NUM_THREADS {threads}")


def _shared_memory() -> Iterator[Finding]:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    if free <= SHM_BYTES:
        fix = "docker run --shm-size=8g, or apptainer --bind /dev/shm"
        yield Finding("warning", "/dev/shm", f"{free / 2**20:.0f} MiB free, too little for loader workers", fix)
        return
    yield Finding("ok", "/dev/shm", f"{free / 2**30:.1f} GiB free")


def _caches() -> Iterator[Finding]:
    places = {"temporary files (TMPDIR)": tempfile.gettempdir()}
    for variable in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "MIOPEN_USER_DB_PATH"):
        if variable in os.environ:
            places[variable] = os.environ[variable]
    bad = []
    for name, place in places.items():
        path = Path(place)
        try:
            tempfile.TemporaryFile(dir=next(one for one in (path, *path.parents) if one.exists())).close()
        except OSError:
            bad.append(f"{name} {place}")
    if bad:
        yield Finding("error", "caches", f"cannot be written: {', '.join(bad)}", "point them at node-local scratch")
        return
    yield Finding("ok", "caches", ", ".join(f"{name} {place}" for name, place in places.items()))


def _leaks() -> Iterator[Finding]:
    """Packages from outside of this environment come first on the path and are used instead of its own."""
    python = shutil.which("python")
    if image() and PREFIX.exists() and python is not None and not Path(python).is_relative_to(PREFIX):
        fix = "unset APPTAINERENV_PREPEND_PATH, and leave PATH to the image"
        yield Finding("error", "leaks", f"`python` is {python}, not the image's {PREFIX}/bin/python", fix)
        return
    own = {path.name for path in Path(sysconfig.get_path("purelib")).iterdir()}
    given = [Path(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    user = Path(site.getusersitepackages())
    for folder, fix in (*((one, "unset PYTHONPATH") for one in given), (user, "export PYTHONNOUSERSITE=1")):
        if str(folder) not in sys.path or not folder.is_dir():
            continue
        names = sorted(own & {path.name for path in folder.iterdir() if not path.name.startswith("_")})
        if names:
            said = f"packages in {folder} shadow this environment's: {', '.join(names[:6])}"
            yield Finding("error", "leaks", said, fix)
            return
    if given:
        said = f"PYTHONPATH={os.environ['PYTHONPATH']} comes before this environment"
        yield Finding("warning", "leaks", said, "unset it, unless that is meant")
        return
    yield Finding("ok", "leaks", "nothing from outside of this environment")


def _owners() -> Iterator[Finding]:
    owners = sorted(set(importlib.metadata.packages_distributions().get("credit", [])))
    others = [name for name in owners if name != DISTRIBUTION]
    if others:
        said = f"{', '.join(others)} also provides `import credit`"
        yield Finding("error", "package", said, f"pip uninstall {' '.join(others)}, then install {DISTRIBUTION} again")
        return
    here = Path(__file__).parents[1]
    yield Finding("ok", "package", f"{DISTRIBUTION} owns `import credit`, from {here}")
