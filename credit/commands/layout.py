"""credit layout: where every rank stands."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import MOST_PROCESSES, whole
from credit.commands.verb import add_verb, load, refuse_contradictions
from credit.errors import ConfigError

EXAMPLES = """examples:
  credit layout my.yaml --nodes 4 --gpus-per-node 4
  srun -N 4 --ntasks-per-node 4 python -m credit layout my.yaml
"""


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs, "layout", run, "show where every rank stands on the mesh: of this job, or of a planned one", EXAMPLES
    )
    parser.add_argument("--nodes", type=whole(), default=None, help="plan for this many nodes, without starting ranks")
    parser.add_argument(
        "--gpus-per-node", type=whole(1, MOST_PROCESSES), default=4, help="ranks a node of the plan (default: 4)"
    )


def run(arguments: argparse.Namespace) -> None:
    from credit.layout import Seat, mesh_shape, table

    if arguments.nodes is not None:
        parallelism = load(arguments).trainer.parallelism
        seats = [Seat(f"node{n}", f"gpu {i}") for n in range(arguments.nodes) for i in range(arguments.gpus_per_node)]
        try:
            print(table(mesh_shape(parallelism.model_dump(), len(seats)), seats))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return
    refuse_contradictions()
    from credit.launch.job import start_job

    with start_job(lambda: load(arguments)) as job:
        job.say(table(job.shape, job.seats))
