"""Who am I: this process's place among the ranks, from the environment its launcher gave it. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from credit.errors import LaunchError

# What other launchers set when they start several processes, and torchrun does not.
_MANY_TASKS = {
    "OMPI_COMM_WORLD_SIZE": "mpiexec (Open MPI)",
    "PMI_SIZE": "mpiexec (MPICH)",
    "PALS_NRANKS": "mpiexec (PALS)",
    "SLURM_STEP_NUM_TASKS": "srun",
}


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`, and who said so."""

    rank: int
    world_size: int
    local_rank: int
    source: str


def discover_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read torchrun's environment; without it, this is the only process.

    Raises:
        LaunchError: if torchrun's variables are incomplete, or if another launcher started several processes,
            each of which would take itself for the only one.
    """
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env]
    if len(given) == 3:
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), "torchrun")
    if given:
        raise LaunchError(
            f"the environment has {', '.join(given)} but not all of RANK, WORLD_SIZE and LOCAL_RANK: "
            f"start the ranks with torchrun, or unset what is left of it"
        )
    for name, launcher in _MANY_TASKS.items():
        if int(env.get(name, "1")) > 1:
            raise LaunchError(
                f"{launcher} started {env[name]} processes ({name}), and each would train alone: start one "
                f"torchrun per node under it, as in `srun --ntasks-per-node 1 torchrun ... -m credit train CONFIG`"
            )
    return Ranks(0, 1, 0, "single process")
