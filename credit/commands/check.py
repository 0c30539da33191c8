"""credit check: a config without ranks; credit check parity: the sharded model against the plain one."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import whole
from credit.commands.findings import show
from credit.commands.parser import add_parser
from credit.commands.verb import add_verb, load
from credit.errors import ConfigError

EXAMPLES = """examples:
  credit check my.yaml --ranks 16
  credit check my.yaml --json
  credit check parity my.yaml --ranks 4
"""

PARITY_EXAMPLES = """examples:
  credit check parity configs/quickstart.yaml --ranks 3
  torchrun --nproc-per-node 2 -m credit check parity configs/quickstart.yaml

Ranks are threads of this process unless a launcher has started some.
Exit code 0 if the sharded model is exact, 1 if it is not, 2 if it is refused or cannot be built.
"""


def add(verbs: Any) -> None:
    summary = "check a config without starting ranks; `check parity`: the sharded model against the plain one"
    checks = add_parser(verbs, "check", summary, EXAMPLES).add_verbs()
    config = add_verb(
        checks, "config", run, "look at config, data, mesh, model and run directory; the word may be left out", EXAMPLES
    )
    config.add_argument("--ranks", type=whole(), default=None, help="ranks in all (default: tensor x domain)")
    config.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parity = add_verb(
        checks,
        "parity",
        parity_of,
        "run the model sharded and plain, and compare outputs and gradients",
        PARITY_EXAMPLES,
    )
    parity.add_argument("--ranks", type=whole(), default=None, help="ranks in all (default: tensor x domain)")
    parity.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16"),
        default="float64",
        help="to compute in; for a model that cannot run in float64 (default)",
    )


def run(arguments: argparse.Namespace) -> int:
    from credit.checks.preflight import preflight

    return show(preflight(arguments.config, arguments.set, arguments.ranks), arguments.json)


def parity_of(arguments: argparse.Namespace) -> int:
    from credit.launch.ranks import choose

    if arguments.ranks is not None:
        tensor = load(arguments).trainer.parallelism.tensor
        if arguments.ranks % tensor:
            raise ConfigError(f"--ranks {arguments.ranks} is not a multiple of trainer.parallelism.tensor: {tensor}")
        arguments.set = [*arguments.set, f"trainer.parallelism.domain={arguments.ranks // tensor}"]
    if choose().size == 1:
        from credit.checks.parity import check_parity

        report = check_parity(load(arguments), arguments.dtype)
        print(report)
        return 0 if report.exact else 1
    from credit.checks.parity import check_parity_of
    from credit.launch.job import start_job

    with start_job(lambda: load(arguments)) as job:
        report = check_parity_of(job, arguments.dtype)
        job.say(str(report))
    return 0 if report.exact else 1
