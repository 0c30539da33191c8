"""credit submit: jobs, from a login node."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import MOST_PROCESSES, file, whole
from credit.commands.verb import add_verb

EXAMPLES = """examples:
  credit submit my.yaml --site perlmutter --nodes 4 --account m1234
  credit submit my.yaml --site derecho --nodes 4 --container credit.sif --dry-run
  credit submit configs/quickstart.yaml --site local --ranks-per-node 4
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "submit", run, "submit a training job from a login node", EXAMPLES)
    parser.add_argument("--site", required=True, help="a name in hpc/sites, a file, my.yaml, or local: this machine")
    parser.add_argument("--nodes", type=whole(), default=1, help="of the job (default: 1)")
    parser.add_argument(
        "--ranks-per-node", type=whole(1, MOST_PROCESSES), default=None, help="default: one a GPU of the site"
    )
    parser.add_argument("--container", type=file, default=None, help="image in which the ranks run")
    parser.add_argument("--time", default=None, metavar="H:MM:SS", help="default: the site's longest")
    parser.add_argument("--account", default=None, help="project that the job is charged to")
    parser.add_argument("--dry-run", action="store_true", help="print the exact script, and submit nothing")


def run(arguments: argparse.Namespace) -> None:
    from credit.launch.submission import submit

    print(
        submit(
            arguments.config,
            site=arguments.site,
            nodes=arguments.nodes,
            ranks_per_node=arguments.ranks_per_node,
            container=arguments.container,
            changes=arguments.set,
            walltime=arguments.time,
            account=arguments.account,
            dry_run=arguments.dry_run,
        )
    )
