"""credit plan: what meshes cost."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import MOST_PROCESSES, positive, whole
from credit.commands.verb import add_verb, load
from credit.errors import ConfigError

EXAMPLES = """examples:
  credit plan configs/quickstart.yaml --gpus 8 --gpu-memory 40
  credit plan my.yaml --site frontier --nodes 16
  credit plan my.yaml --slices --gpu-memory 24
  credit plan my.yaml --gpus 256 --gpu-memory 80 --gpus-per-node 8 --set trainer.precision=bf16
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "plan", run, "estimate memory and traffic per rank for every mesh; needs no GPU", EXAMPLES)
    parser.add_argument("--site", default=None, help="a name in hpc/sites or a file, my.yaml, which knows its GPUs")
    parser.add_argument("--nodes", type=whole(), default=1, help="of the site (default: 1)")
    parser.add_argument("--gpus", type=whole(), default=None, help="devices in all, without a site")
    parser.add_argument("--gpu-memory", type=positive, default=None, metavar="GB", help="memory of each, in 1e9 bytes")
    parser.add_argument("--slices", action="store_true", help="of one device instead: what slices need that take turns")
    parser.add_argument("--grid", metavar="LATxLON", help="such as 721x1440, where the data are not here")
    parser.add_argument(
        "--gpus-per-node", type=whole(1, MOST_PROCESSES), default=None, help="default: the site's, or 4"
    )


def run(arguments: argparse.Namespace) -> None:
    from credit.checks.plan import plan, plan_slices

    if arguments.grid is not None:
        if load(arguments).data.is_region:
            raise ConfigError("--grid is of the globe, and data.grid is region: a region's store must be here")
        arguments.set = [*arguments.set, f"data.grid=[{arguments.grid.replace('x', ',')}]"]
    config = load(arguments)
    known = None
    if arguments.site is not None:
        from credit.launch.sites import load_site

        known = load_site(arguments.site)
    per_node = arguments.gpus_per_node or (known.gpus_per_node if known else 4)
    gpus = arguments.gpus or (arguments.nodes * per_node if known else None)
    memory = arguments.gpu_memory or (known.gpu_memory if known else None)
    if arguments.slices:
        print(plan_slices(config, memory))
        return
    if gpus is None or memory is None:
        raise ConfigError("which devices? Give --gpus and --gpu-memory, or a --site that knows its GPUs' memory")
    print(plan(config, gpus, memory, per_node))
