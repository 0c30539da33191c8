"""What the launchers say of this process: claims read from the environment, one of them taken, the others compared.

The one that counts is, in this order: `CREDIT_LAUNCHER`, torchrun, MPI, Slurm, PALS, submitit on this machine, or
nobody, which means a single process. No torch, no MPI: those are for `credit.launch.rendezvous`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from credit.errors import LaunchError

LEFT_OVER = "start the ranks with the launcher itself, or unset what is left of it, or set CREDIT_LAUNCHER=single"
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""By which a process is shown some of its node's GPUs."""
LAUNCHERS = ("torchrun", "mpi", "slurm", "pals", "submitit", "single")


@dataclass(frozen=True)
class Claim:
    """What one launcher says.

    Attributes:
        source: one of `LAUNCHERS`.
        said_by: the command, for messages.
        rank, size: in the launcher's own numbering.
        local_rank, local_size: among the processes that it started on this node; None if it does not say.
        job: names the start of these ranks, the same on all of them and on no others.
        first_host: where rank 0 is; None if the launcher does not say, or brings its own rendezvous.
    """

    source: str
    said_by: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    job: str = ""
    first_host: str | None = None


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet: rank 0 listens already, on the file descriptor `listening`; the others connect."""

    address: str
    port: int
    listening: int | None = None


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`, renumbered by (node, local rank), and who said so.

    Attributes:
        rendezvous: None for one process, and for torchrun, which has its own.
    """

    rank: int
    world_size: int
    local_rank: int
    source: str
    rendezvous: Rendezvous | None = None


def claims(env: Mapping[str, str] = os.environ) -> list[Claim]:
    """Everything that the environment says of this process's place, in the order of precedence.

    Raises:
        LaunchError: if the variables of a launcher are incomplete.
    """
    found = [_torchrun(env), _mpi(env), _slurm(env), _pals(env), _submitit(env)]
    return [claim for claim in found if claim is not None]


def choose(env: Mapping[str, str] = os.environ) -> Claim:
    """The claim that counts, after comparing it with the others.

    Raises:
        LaunchError: if what the launchers say cannot be true together, with the remedy.
    """
    explicit = env.get("CREDIT_LAUNCHER")
    if explicit is not None and explicit not in LAUNCHERS:
        raise LaunchError(f"CREDIT_LAUNCHER is {explicit!r}, not one of {', '.join(LAUNCHERS)}")
    single = Claim("single", "nobody", 0, 1, 0, 1)
    if explicit == "single":
        return single
    found = claims(env)
    if explicit == "mpi" and not any(claim.source == "mpi" for claim in found):
        chosen = Claim("mpi", "CREDIT_LAUNCHER", 0, 0)
    elif explicit is not None:
        named = [claim for claim in found if claim.source == explicit]
        if not named:
            raise LaunchError(f"CREDIT_LAUNCHER is {explicit}, but the environment has none of its variables")
        chosen = named[0]
    else:
        chosen = found[0] if found else single
    if chosen.size and chosen.rank >= chosen.size:  # 0: mpi4py is yet to say
        raise LaunchError(f"{chosen.said_by} says that this is rank {chosen.rank} of {chosen.size}: {LEFT_OVER}")
    if chosen.source == "single":
        _refuse_lost_launcher(env)
    if chosen.source == "torchrun":
        _compare_with_outer(chosen, [claim for claim in found if claim.source != "torchrun"], env)
    return chosen


def hides_gpus(env: Mapping[str, str] = os.environ) -> bool:
    """True if this process was told to leave GPUs alone. HIP shows them all the same if the variable is empty."""
    return any(env.get(variable) in ("", "-1") for variable in VISIBLE)


def number_on_node(seen: int, env: Mapping[str, str] = os.environ) -> str:
    """The number, or the name, of the GPU that this process sees as number `seen`, among all of its node.

    ROCr hides devices from HIP, and HIP, which knows CUDA's variable too, some of those that are left.
    """
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in env else "CUDA_VISIBLE_DEVICES"
    place = str(seen)
    for variable in (hip, "ROCR_VISIBLE_DEVICES"):
        listed = [one.strip() for one in env.get(variable, "").split(",") if one.strip()]
        if place.isdecimal() and int(place) < len(listed):
            place = listed[int(place)]
    return place


def gpus_of_job(env: Mapping[str, str] = os.environ) -> str | None:
    """In words, the GPUs that the scheduler gave to this process; None if it says nothing of any."""
    for variable in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", *VISIBLE):
        if env.get(variable, "") not in ("", "-1", "NoDevFiles"):
            return f"the job has GPUs ({variable}={env[variable]})"
    return None


def speaks(env: Mapping[str, str] = os.environ) -> bool:
    """True on the process that prints what all know: the first by every launcher's account."""
    try:
        return all(claim.rank == 0 for claim in claims(env))
    except LaunchError:
        return env.get("RANK", "0") == "0"


def rank_said(env: Mapping[str, str] = os.environ) -> int:
    """This process's rank by the launcher that counts; 0 where none is understood. For names of files."""
    try:
        return choose(env).rank
    except LaunchError:
        return 0


def _torchrun(env: Mapping[str, str]) -> Claim | None:
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env]
    if not given:
        return None
    if len(given) < 3:
        raise LaunchError(
            f"the environment has {', '.join(given)} but not all of RANK, WORLD_SIZE and LOCAL_RANK: "
            f"start the ranks with torchrun, or unset what is left of it"
        )
    said_by = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "the environment (RANK, WORLD_SIZE)"
    local_size = number_of(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None
    rank, size, local = (number_of(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Claim("torchrun", said_by, rank, size, local, local_size)


def _mpi(env: Mapping[str, str]) -> Claim | None:
    open_mpi = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    mpich = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    for said_by, names in (("mpiexec (Open MPI)", open_mpi), ("mpiexec (MPICH)", mpich)):
        if all(name in env for name in names):
            rank, size, local, local_size = (number_of(env, name) for name in names)
            return Claim("mpi", said_by, rank, size, local, local_size)
    return None


def _slurm(env: Mapping[str, str]) -> Claim | None:
    """The step's; a batch script has SLURM_PROCID too, without being a task."""
    if not env.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in env:
        return None
    node, each = number_of(env, "SLURM_NODEID", "0"), _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    names = ("CLUSTER_NAME", "JOB_ID", "STEP_ID", "RESTART_COUNT")
    job = ".".join(env.get(f"SLURM_{name}", "0") for name in names)
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST", "localhost"))
    rank, size = number_of(env, "SLURM_PROCID"), number_of(env, "SLURM_STEP_NUM_TASKS")
    if node >= len(each):
        raise LaunchError(f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE is of {len(each)} nodes: {LEFT_OVER}")
    return Claim("slurm", "srun", rank, size, number_of(env, "SLURM_LOCALID", "0"), each[node], job, hosts[0])


def _pals(env: Mapping[str, str]) -> Claim | None:
    if "PALS_RANKID" not in env:
        return None
    size = env.get("PMI_SIZE") or env.get("PALS_NRANKS")
    if size is None:
        raise LaunchError(
            "mpiexec (PALS) says PALS_RANKID, but nothing says how many ranks there are (PMI_SIZE)", fix=LEFT_OVER
        )
    first = env.get("CREDIT_FIRST_HOST")
    job = f"{env.get('PBS_JOBID', '')}.{env.get('PALS_APID', '')}"
    local = [number_of(env, name) if name in env else None for name in ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE")]
    world = number_of(env, "PMI_SIZE" if env.get("PMI_SIZE") else "PALS_NRANKS")
    return Claim("pals", "mpiexec (PALS)", number_of(env, "PALS_RANKID"), world, local[0], local[1], job, first)


def _submitit(env: Mapping[str, str]) -> Claim | None:
    if "SUBMITIT_LOCAL_GLOBALID" not in env:
        return None
    names = ("GLOBALID", "NTASKS", "LOCALID", "NTASKS")
    rank, size, local, local_size = (number_of(env, f"SUBMITIT_LOCAL_{name}") for name in names)
    job = f"{socket.gethostname()}.{env.get('SUBMITIT_LOCAL_JOB_ID', '')}"
    return Claim("submitit", "submitit", rank, size, local, local_size, job, "localhost")


def number_of(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    """A count or a rank that a launcher says.

    Raises:
        LaunchError: if it does not, or says something else.
    """
    text = env.get(name, default)
    if text is None:
        raise LaunchError(f"the environment has no {name}, which goes with the others of this launcher: {LEFT_OVER}")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise LaunchError(f"{name} is {text!r}, and must be a whole number: {LEFT_OVER}")
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts = re.findall(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", text)
    return [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]


def expand_nodelist(text: str) -> list[str]:
    """Slurm's "n[0-2,07],m1" as [n0, n1, n2, n07, m1]. Containers have no scontrol to ask.

    Raises:
        LaunchError: if it is no such list.
    """
    number = r"[0-9]{1,9}(-[0-9]{1,9})?"
    if not re.fullmatch(rf"([^\[\],\s]|\[{number}(,{number})*\]|,)+", text) or not text.strip(","):
        raise LaunchError(f"SLURM_STEP_NODELIST is {text!r}, and no list of hosts: {LEFT_OVER}")
    return [name for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for name in _expand(part)]


def _expand(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, tail = rest.partition("]")
    for run in inside.split(","):
        low, _, high = run.partition("-")
        for number in range(int(low), int(high or low) + 1):
            for end in _expand(tail):
                yield f"{head}{number:0{len(low)}d}{end}"


def _compare_with_outer(inner: Claim, outer: list[Claim], env: Mapping[str, str]) -> None:
    """torchrun itself may have been started by another launcher, once a node."""
    agents = number_of(env, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in env else None
    for claim in outer:
        if claim.size == 1:
            continue
        if agents is None:  # the variables were set by hand: one process a task
            if (claim.rank, claim.size) != (inner.rank, inner.size):
                raise LaunchError(
                    f"{claim.said_by} says rank {claim.rank} of {claim.size}, but RANK and WORLD_SIZE say {inner.rank} "
                    f"of {inner.size}: unset RANK, WORLD_SIZE and LOCAL_RANK, {claim.said_by} alone is enough"
                )
        elif claim.local_size is not None and claim.local_size > 1:
            raise LaunchError(
                f"double launch: {claim.said_by} started {claim.local_size} processes on this node, and each started "
                f"torchrun, which starts {inner.local_size} more: start torchrun once a node "
                f"(srun --ntasks-per-node=1 torchrun ...), or none at all (srun python -m credit ...)"
            )
        elif agents != claim.size:
            raise LaunchError(
                f"{claim.said_by} started torchrun on {claim.size} nodes, but torchrun makes a world of {agents}: the "
                f"nodes would train apart. Give torchrun --nnodes={claim.size} and a rendezvous that all nodes reach"
            )
    several = (agents or 1) > 1 or (inner.local_size is not None and inner.size > inner.local_size)
    address = env.get("MASTER_ADDR", "")
    # A host may take its own name for a loopback address, where the others know better.
    own = address.split(".")[0] == socket.gethostname().split(".")[0]
    if several and not own and is_loopback(address):
        raise LaunchError(
            f"MASTER_ADDR is {address}, which every node takes for itself, but there are several nodes: give torchrun "
            f"the first node's name as --master-addr, or with --rdzv-backend=c10d, which takes each node's own name, "
            f"its address on every node as --local-addr"
        )


def is_loopback(address: str) -> bool:
    """True if a name or an address is that of the host that asks."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter of what no name can be
        return False
    return any(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def _refuse_lost_launcher(env: Mapping[str, str]) -> None:
    """One process that somebody started several of would train alone, and its peers too."""
    tasks = number_of(env, "SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env and tasks > 1:
        raise LaunchError(
            f"the Slurm job {env['SLURM_JOB_ID']} has {tasks} tasks, but this process was started without srun, and "
            f"would be the only one: write `srun` before the command, or set CREDIT_LAUNCHER=single for one process"
        )
    for name in _ancestors():
        if re.fullmatch(r"hydra_pmi_proxy|orted|prted|palsd|hydra_bstrap_proxy", name):
            raise LaunchError(
                f"mpiexec started this process ({name}), but its variables did not get here, so every rank would train "
                f"alone: a container's --cleanenv drops them; leave it out, or pass PMI_*, MPI_LOCAL*, OMPI_*; or set "
                f"CREDIT_LAUNCHER=single for one process"
            )
        step = re.fullmatch(r"slurmstepd: \[(\d+)\.(\d+)\]", name)
        if step and "SLURM_STEP_ID" not in env:
            raise LaunchError(
                f"srun started this process (step {step[1]}.{step[2]}), but its variables did not get here, so every "
                f"rank would train alone: a container's --cleanenv drops SLURM_*; leave it out, or pass them; or set "
                f"CREDIT_LAUNCHER=single for one process"
            )


def _ancestors() -> Iterator[str]:
    """Names of the processes above this one, as far as /proc shows them; of slurmstepd with its step."""
    pid = os.getppid()
    while pid > 1:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return
        yield title if title.startswith("slurmstepd") else os.path.basename(title)
        pid = parent
