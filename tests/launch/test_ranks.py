"""What launchers say, read from the environments that they gave when they were run (Slurm 22.05, MPICH 5, torchrun)."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from credit import status
from credit.errors import LaunchError
from credit.launch.job import choose_device, gpu_name, refuse_differences, refuse_shared_devices
from credit.launch.ranks import choose, claims, expand_nodelist, gpus_of_job
from credit.launch.rendezvous import Arrival, number
from credit.layout import MeshShape, Seat, groups, straddling, table

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
OPEN_MPI = {
    f"OMPI_COMM_WORLD_{name}": n for name, n in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2402", strict=True)
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "192.0.2.7",
}
PALS = {"PALS_RANKID": "9", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "16", "CREDIT_FIRST_HOST": "x1000"}
LOCAL = {f"SUBMITIT_LOCAL_{k}": v for k, v in {"GLOBALID": "1", "NTASKS": "2", "LOCALID": "1", "JOB_ID": "4"}.items()}


@pytest.mark.parametrize(
    ("env", "source", "rank", "size"),
    [
        ({}, "single", 0, 1),
        (SRUN, "slurm", 3, 4),
        (HYDRA, "mpi", 1, 4),
        (OPEN_MPI, "mpi", 2, 4),
        ({**SRUN, **HYDRA}, "mpi", 1, 4),  # mpiexec in an allocation: Slurm speaks of the launcher's daemon
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, "slurm", 3, 4),  # srun --mpi=pmi2
        (TORCHRUN, "torchrun", 5, 8),
        ({**TORCHRUN, **SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "torchrun", 5, 8),
        (PALS, "pals", 9, 16),
        (LOCAL, "submitit", 1, 2),
        ({**SRUN, "CREDIT_LAUNCHER": "single"}, "single", 0, 1),
        ({**SRUN, **HYDRA, "CREDIT_LAUNCHER": "slurm"}, "slurm", 3, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "single", 0, 1),  # a batch script
    ],
)
def test_the_first_that_speaks_counts(env, source, rank, size) -> None:
    claim = choose(env)
    assert (claim.source, claim.rank, claim.size) == (source, rank, size)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "has RANK but not all of RANK, WORLD_SIZE and LOCAL_RANK"),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR is 127.0.0.1, which every node takes for itself"),
        ({**TORCHRUN, "MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost, which every node takes for itself"),
        ({**TORCHRUN, **SRUN}, "double launch: srun started 2 processes on this node"),
        ({**TORCHRUN, **HYDRA}, "double launch: mpiexec (MPICH) started 4 processes on this node"),
        ({**TORCHRUN, **SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, "srun started torchrun on 4 nodes, but torchrun"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "srun says rank 3 of 4, but RANK and WORLD_SIZE"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "has 8 tasks, but this process was started"),
        ({"PALS_RANKID": "0"}, "nothing says how many ranks there are"),
        ({"CREDIT_LAUNCHER": "slrum"}, "CREDIT_LAUNCHER is 'slrum', not one of torchrun, mpi, slurm"),
        ({"CREDIT_LAUNCHER": "slurm"}, "CREDIT_LAUNCHER is slurm, but the environment has none of its variables"),
    ],
)
def test_what_cannot_be_true_together_is_refused(env, message) -> None:
    with pytest.raises(LaunchError) as caught:
        choose(env)
    assert message in str(caught.value)


def test_a_claim_knows_its_node() -> None:
    (claim,) = claims({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"})
    assert (claim.local_size, claim.first_host, claim.job) == (3, "n0", "0.7.0.0")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n0", ["n0"]),
        ("n[0-2,07],m1", ["n0", "n1", "n2", "n07", "m1"]),
        ("nid[001-003]", ["nid001", "nid002", "nid003"]),
        ("r[1-2]c[3,4]", ["r1c3", "r1c4", "r2c3", "r2c4"]),
    ],
)
def test_node_lists(text, names) -> None:
    assert expand_nodelist(text) == names


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_ranks_are_numbered_node_by_node(each: list[int], draw: random.Random) -> None:
    """Whatever the distribution and the order of arrival: a node's ranks are consecutive, and rank 0 stays."""
    hosts = [f"h{node}" for node, ranks in enumerate(each) for _ in range(ranks)]
    draw.shuffle(hosts)
    arrivals = [Arrival(rank, len(hosts), host, 0) for rank, host in enumerate(hosts)]
    draw.shuffle(arrivals)
    places = number(arrivals)
    by_rank = sorted(zip(places, arrivals, strict=True), key=lambda pair: pair[0].rank)
    assert [place.rank for place, _ in by_rank] == list(range(len(hosts)))
    assert by_rank[0][1].rank == 0
    seen = list(dict.fromkeys(arrival.host for _, arrival in by_rank))
    assert sum(1 for a, b in pairwise(by_rank) if a[1].host != b[1].host) == len(seen) - 1
    for node, host in enumerate(seen):
        mine = [(place.local_rank, arrival.rank) for place, arrival in by_rank if arrival.host == host]
        assert [local for local, _ in mine] == list(range(len(mine)))
        assert [rank for _, rank in mine] == sorted(rank for _, rank in mine)
        assert {place.node for place, arrival in by_rank if arrival.host == host} == {node}


def test_worlds_that_do_not_agree() -> None:
    with pytest.raises(LaunchError, match="2 came, but rank 1 on b says 3"):
        number([Arrival(0, 2, "a", 1), Arrival(1, 3, "b", 2)])
    with pytest.raises(LaunchError, match="two processes say that they are rank 0, on a and b"):
        number([Arrival(0, 2, "a", 1), Arrival(0, 2, "b", 2)])


def test_two_ranks_on_one_gpu() -> None:
    seats = [Seat("a", "GPU-1"), Seat("a", "GPU-2"), Seat("b", "GPU-1"), Seat("a", "GPU-2")]
    refuse_shared_devices(seats[:3])
    refuse_shared_devices([Seat("a", "cpu")] * 3)
    with pytest.raises(LaunchError, match="ranks 1 and 3 are both on GPU GPU-2 of a"):
        refuse_shared_devices(seats)


def test_versions_that_differ() -> None:
    seats = [Seat("a", "cpu"), Seat("b", "cpu")]
    with pytest.raises(LaunchError, match=r"do not agree on torch: 2.13 \(rank 0 on a\), 2.12 \(rank 1 on b\)"):
        refuse_differences(seats, [{"torch": "2.13"}, {"torch": "2.12"}])


def test_groups_and_those_that_leave_their_node() -> None:
    shape = MeshShape(2, 2, 2)
    assert list(groups(shape, "domain")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(groups(shape, "tp")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert straddling(shape, ["a"] * 4 + ["b"] * 4) == []
    (line,) = straddling(shape, ["a", "a", "b", "b"] * 2)
    assert line.startswith("warning: 4 of 4 tp groups straddle nodes (ranks 0 to 2: a, b)")
    text = table(shape, [Seat(f"node{rank // 4}", "cpu") for rank in range(8)])
    assert text.splitlines()[6].split() == ["5", "node1", "cpu", "1", "0", "1"]


def test_a_job_with_gpus_that_torch_cannot_see_is_refused(monkeypatch) -> None:
    """A container without --nv; a torch for the CPU cannot have been meant for them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    assert choose_device(0).type == "cpu"
    monkeypatch.setattr("torch.version.cuda", "12.8")
    with pytest.raises(LaunchError, match=r"the job has GPUs \(SLURM_STEP_GPUS=0,1\).*start a container with --nv"):
        choose_device(0)
    monkeypatch.delenv("SLURM_STEP_GPUS")
    assert choose_device(0).type == "cpu"


def test_two_jobs_do_not_write_into_one_run_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(status, "CLAIM_S", 0.1)
    busy = pytest.raises(LaunchError, match="another job writes into")
    with status.claimed(tmp_path / "run"), busy, status.claimed(tmp_path / "run"):
        pass
    with status.claimed(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="the run directory cannot be written"), status.claimed(tmp_path / "file"):
        pass


ODD = (
    *(None, "", "x", "-1", "1.5", "9999999999", "\u0663", "\u00b2"),
    "1" * 5000,
    "n[0-",
    "n[1-x]",
    "[",
    ",",
    "2(x9999999)",
)


@pytest.mark.parametrize("env", [TORCHRUN, SRUN, HYDRA, PALS, LOCAL, {**TORCHRUN, **SRUN}], ids=range(6))
def test_odd_variables_are_refused_in_words_or_harmless(env) -> None:
    """Each variable of each launcher, missing or odd: a place that can be, or words that name a way out."""
    for name in env:
        for value in ODD:
            given = {**env, name: value} if value is not None else {key: env[key] for key in env if key != name}
            said = ""
            try:
                claim = choose(given)
            except LaunchError as error:
                said, claim = str(error), choose({**given, "CREDIT_LAUNCHER": "single"})
            assert 0 <= claim.rank < max(claim.size, 1), (name, value, claim)
            assert not said or re.search("CREDIT_LAUNCHER|start|unset|give", said), (name, value, said)


def test_a_rank_beyond_the_world_is_of_another_start() -> None:
    with pytest.raises(LaunchError, match="srun says that this is rank 3 of 2"):
        choose({**SRUN, "SLURM_STEP_NUM_TASKS": "2"})


ZERO = "00000000-0000-0000-0000-000000000000"
OTHER = "5f1d2c3b-0000-1111-2222-333344445555"
GPUS = {
    "a uuid": (OTHER, (0, 0, 0), 0, {}, OTHER),
    "a uuid, whatever is shown": (OTHER, (0, 7, 0), 0, {"CUDA_VISIBLE_DEVICES": "3"}, OTHER),
    "virtual, on a bus": (ZERO, (0, 0x41, 0), 0, {}, "0:41:00"),
    "virtual, on none": (ZERO, (0, 0, 0), 2, {}, "number 2"),
    "virtual, one shown to each rank": (ZERO, (0, 0, 0), 0, {"ROCR_VISIBLE_DEVICES": "5"}, "number 5"),
    "virtual, shown twice": (
        ZERO,
        (0, 0, 0),
        0,
        {"ROCR_VISIBLE_DEVICES": "4,6", "HIP_VISIBLE_DEVICES": "1"},
        "number 6",
    ),
    "virtual, shown by CUDA's name": (ZERO, (0, 0, 0), 0, {"CUDA_VISIBLE_DEVICES": "7,1"}, "number 7"),
    "a part": (OTHER, (0, 7, 0), 0, {"CUDA_VISIBLE_DEVICES": "MIG-aa, MIG-bb"}, "MIG-aa"),
    "another part of it": (OTHER, (0, 7, 0), 1, {"CUDA_VISIBLE_DEVICES": "MIG-aa, MIG-bb"}, "MIG-bb"),
    "more numbers than are listed": (ZERO, (0, 0, 0), 3, {"CUDA_VISIBLE_DEVICES": "1"}, "number 3"),
}


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_known_by_what_tells_it_from_others(name: str) -> None:
    uuid, (domain, bus, place), seen, env, wanted = GPUS[name]
    made_up = SimpleNamespace(uuid=uuid, pci_domain_id=domain, pci_bus_id=bus, pci_device_id=place)
    assert gpu_name(made_up, seen, env) == wanted


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_who_is_shown_no_gpu_takes_none(variable: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as HIP answers where the variable is empty
    monkeypatch.setenv(variable, "")
    assert choose_device(0).type == "cpu"
    assert gpus_of_job({variable: "2"}) == f"the job has GPUs ({variable}=2)"
