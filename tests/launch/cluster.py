"""A real Slurm of seven nodes on this machine, for tests: Debian's packages, a UTS namespace a node. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.launch import apt

LAB = Path("/tmp/credit-slurm")  # short: slurmstepd makes sockets under it
NODES = [f"n{i}" for i in range(7)]
GPUS = 16  # scripts ask for four a node, and several jobs run on a node at a time
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
CONFIG = """ClusterName=credit
SlurmctldHost={host}({address})
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start again only after its old credential has expired.
AuthInfo=cred_expire=5
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
TmpFS={lab}/tmp/%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
SlurmctldLogFile={lab}/slurmctld.log
SlurmdLogFile={lab}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=15
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=n[0-3] Default=YES MaxTime=INFINITE
# Of nodes that tests crash.
PartitionName=frail Nodes=n[4-6] MaxTime=INFINITE
"""
MARK = "# credit-slurm"


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        return "namespaces cannot be made here"
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return None
    if not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt to install it"
    try:
        apt.install(*PACKAGES)
    except subprocess.CalledProcessError as error:
        return f"Slurm cannot be installed: {error.stdout.strip().splitlines()[-1:]}"
    return None


def start() -> None:
    """Bring the nodes up; a cluster that is left from before is taken down first."""
    stop()
    for folder in ("state", "dev", *(f"{kind}/{node}" for kind in ("spool", "tmp") for node in NODES)):
        (LAB / folder).mkdir(parents=True)
    _start_munge()
    address = _address()
    hosts = [line for line in Path("/etc/hosts").read_text().splitlines() if MARK not in line]
    Path("/etc/hosts").write_text("\n".join([*hosts, *(f"{address} {node} {MARK}" for node in NODES), ""]))
    for gpu in range(GPUS):
        (LAB / "dev" / f"gpu{gpu}").symlink_to("/dev/null")  # a character device is all that slurmd asks for
    (LAB / "gres.conf").write_text(f"NodeName=n[0-{len(NODES) - 1}] Name=gpu File={LAB}/dev/gpu[0-{GPUS - 1}]\n")
    (LAB / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    lines = [
        f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={27000 + i} CPUs=256 Gres=gpu:{GPUS}"
        for i, node in enumerate(NODES)
    ]
    text = CONFIG.format(host=socket.gethostname().split(".")[0], address=address, lab=LAB, nodes="\n".join(lines))
    (LAB / "slurm.conf").write_text(text)
    subprocess.run(["slurmctld", "-c", "-f", LAB / "slurm.conf"], check=True)
    for node in NODES:
        start_node(node)
    deadline = time.monotonic() + 60
    while idle() < len(NODES):
        if time.monotonic() > deadline:
            raise TimeoutError((LAB / "slurmctld.log").read_text()[-2000:])
        time.sleep(0.2)


def start_node(node: str) -> None:
    conf = LAB / "slurm.conf"
    subprocess.run(
        ["unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -N {node} -f {conf}"], check=True, env=env()
    )


def crash_node(node: str) -> None:
    """Everything on it at once, as when the power goes."""
    mine = os.readlink("/proc/self/ns/uts")
    slurmd = int((LAB / f"slurmd.{node}.pid").read_text())
    space = os.readlink(f"/proc/{slurmd}/ns/uts")
    assert space != mine
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/uts") == space:
                os.kill(int(process.name), 9)
        except OSError:
            continue


def stop() -> None:
    """Take everything down that `start` brought up."""
    if (LAB / "slurm.conf").exists():
        subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, env=env(), capture_output=True)
        for pid in [*LAB.glob("slurmd.*.pid"), LAB / "slurmctld.pid"]:
            _kill(pid)
    if (LAB / "munged.pid").exists():
        _kill(LAB / "munged.pid")
    hosts = Path("/etc/hosts").read_text().splitlines()
    if any(MARK in line for line in hosts):
        Path("/etc/hosts").write_text("\n".join(line for line in hosts if MARK not in line) + "\n")
    shutil.rmtree(LAB, ignore_errors=True)


def env() -> dict[str, str]:
    return {**os.environ, "SLURM_CONF": str(LAB / "slurm.conf")}


def idle() -> int:
    """How many nodes wait for a job."""
    done = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=env(), capture_output=True, text=True)
    return len(set(done.stdout.split()))


def sbatch(*words: str, seconds: float = 240, **more: Any) -> subprocess.CompletedProcess:
    """`sbatch --wait`, which asks ever more seldom; the exit code is that of the job."""
    done = subprocess.run(["sbatch", "--parsable", *words], stdout=subprocess.PIPE, text=True, **more)
    deadline = time.monotonic() + seconds
    while done.returncode == 0:
        assert time.monotonic() < deadline, f"job {done.stdout.strip()} does not end in {seconds} s"
        time.sleep(0.3)
        job = subprocess.run(["scontrol", "-o", "show", "job", done.stdout.strip()], env=env(), capture_output=True)
        told = dict(part.split("=", 1) for part in job.stdout.decode().split() if "=" in part)
        if told["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            done.returncode = int(told["ExitCode"].split(":")[0]) or int(told["JobState"] != "COMPLETED")
            return done
    return done


def _start_munge() -> None:
    if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode == 0:
        return
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge"], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    shutil.copy("/run/munge/munged.pid", LAB / "munged.pid")


def _address() -> str:
    """Of this machine on its network: a loopback address would hide what nodes cannot reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.77.1"


def _kill(file: Path) -> None:
    """End the daemon of this pid file, which it removes itself on its way out: read once."""
    try:
        pid = int(file.read_text())
        os.kill(pid, 15)
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + 15
    while file.exists() and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
