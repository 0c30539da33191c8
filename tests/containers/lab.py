"""Real images on a bare Debian: the tools from Debian's packages, a base from debootstrap, kept between runs. Root.

No registry can be reached where the tests run, so the base is a stand-in for python:3.11-slim-bookworm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

from tests.launch import apt

ROOT = Path(__file__).parents[2]
LAB = Path("/tmp/credit-containers")
USER = "credit-user"
IMAGE = "localhost/credit:test"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "credit", "configs", "hpc", "containers")
PODMAN = {
    "containers.conf": """[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
""",
    "storage.conf": f"""[storage]
driver = "overlay"
graphroot = "{LAB}/storage"
runroot = "{LAB}/run"
""",
}


_making_the_base = threading.Lock()


class MissingError(Exception):
    """Why the tools cannot be had here."""


def environment() -> dict[str, str]:
    """For podman and buildah."""
    own = {"CONTAINERS_CONF": str(LAB / "containers.conf"), "CONTAINERS_STORAGE_CONF": str(LAB / "storage.conf")}
    # Builds run in a chroot: a container within a container may not do more.
    return {**os.environ, **own, "BUILDAH_ISOLATION": "chroot", "DEBIAN_FRONTEND": "noninteractive"}


def call(*command: str | Path, timeout: float = 900, error: type[Exception] = MissingError) -> str:
    """Run it; its output. Raises `error` with the end of it if it fails: only tools may be missing, builds fail."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise error(f"{' '.join(map(str, command))}: {done.stdout[-1500:]}")
    return done.stdout


def base() -> Path:
    """The base image's tar file, which both kinds of images wait for."""
    with _making_the_base:
        return _base()


@cache
def _base() -> Path:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise MissingError("only root can install Apptainer and podman, by apt")
    LAB.mkdir(exist_ok=True)
    LAB.chmod(0o755)
    if subprocess.run(["id", USER], capture_output=True).returncode:
        call("useradd", "--create-home", USER)
    refuse_closed_checkout()
    for name, text in PODMAN.items():
        (LAB / name).write_text(text)
    tar = LAB / "base.tar"
    if not tar.exists():
        _install("mmdebstrap")
        left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
        sources = "/etc/apt/sources.list.d/debian.sources"
        packages = "--include=ca-certificates,python3,python3-venv"
        # No device nodes: an unprivileged build could not make them.
        options = ["--quiet", "--mode=root", "--variant=minbase", packages, *left_out, "--skip=output/dev,output/mknod"]
        call("mmdebstrap", *options, "bookworm", LAB / "part.tar", sources)
        (LAB / "part.tar").rename(tar)
    return tar


def refuse_closed_checkout() -> None:
    """An ordinary user runs the images in this checkout, as users do: it must get there."""
    closed = [folder for folder in (ROOT, *ROOT.parents) if not folder.stat().st_mode & 0o001]
    assert not closed, f"no ordinary user can enter {closed[-1]}: chmod o+x it, or clone to a place that is open"


def _install(*programs: str, more: tuple[str, ...] = ()) -> None:
    missing = [program for program in programs if not shutil.which(program)]
    if not missing:
        return
    try:
        apt.install(*missing, *more)
    except subprocess.CalledProcessError as error:
        raise MissingError(f"{error}: {error.stdout[-1500:]}") from None


def sources_digest() -> str:
    """Of everything that goes into an image."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def build(*words: str | Path) -> None:
    """Other tests run meanwhile, and some of them have deadlines."""
    call("nice", "containers/build.sh", *words, timeout=1500, error=AssertionError)


def build_sif() -> Path:
    """`containers/build.sh sif`, unless the image of these sources is there."""
    tar = base()
    if not shutil.which("apptainer"):
        with apt.lock:
            call("bash", ROOT / "containers/install-apptainer.sh")
    for name in ("/etc/subuid", "/etc/subgid"):  # for --fakeroot
        file = Path(name)
        if "root:" not in (file.read_text() if file.exists() else ""):
            with file.open("a") as stream:
                stream.write("root:1000000:65536\n")
    if not Path("/dev/fuse").exists():
        raise MissingError("there is no /dev/fuse, by which images are mounted")
    Path("/dev/fuse").chmod(0o666)  # what udev does elsewhere: ordinary users mount images
    sif = LAB / f"credit-{sources_digest()}.sif"
    if not sif.exists():
        for old in LAB.glob("credit-*.sif"):
            old.unlink()
        build("sif", "--from", tar, "--output", LAB / "part.sif")
        (LAB / "part.sif").chmod(0o755)
        (LAB / "part.sif").rename(sif)
    return sif


def build_oci() -> str:
    """`containers/build.sh oci`, unless the image of these sources is there."""
    tar = base()
    _install("buildah", "podman", "runc", more=("fuse-overlayfs", "netavark"))
    tag = f"{IMAGE}-{sources_digest()}"
    if subprocess.run(["podman", "image", "exists", tag], env=environment(), capture_output=True).returncode:
        known = call("podman", "images", "--format", "{{.Repository}}:{{.Tag}}").split()
        if old := [name for name in known if name.startswith(IMAGE)]:
            call("podman", "rmi", "--force", *old)
        build("oci", "--tool", "buildah", "--from", tar, "--output", tag)
    return tag
