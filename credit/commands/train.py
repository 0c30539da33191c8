"""credit train: the training loop."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import whole
from credit.commands import check
from credit.commands.verb import add_slices, add_verb, load, refuse_contradictions

EXAMPLES = """examples:
  credit train configs/era5_sample.yaml
  torchrun --nproc-per-node 4 -m credit train configs/quickstart.yaml
  torchrun --nproc-per-node 4 -m credit train my.yaml --set trainer.epochs=5 --set run=runs/five
  credit train my.yaml --dry-run --ranks 16
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "train", run, "train the model; run the same command again to resume", EXAMPLES)
    parser.add_argument("--dry-run", action="store_true", help="credit check instead: start nothing")
    add_slices(parser)
    parser.add_argument("--ranks", type=whole(), default=None, help="with --dry-run: of so many ranks")
    parser.add_argument(
        "--profile", type=whole(0), default=0, metavar="STEPS", help="write a chrome trace of some steps"
    )


def run(arguments: argparse.Namespace) -> int | None:
    if arguments.dry_run:
        return check.run(argparse.Namespace(**vars(arguments), json=False))
    from credit.stop import stop_requests

    refuse_contradictions()
    with stop_requests() as request:  # from here on, however long the ranks take to come up
        from credit.launch.job import start_job
        from credit.training.train import train

        with start_job(lambda: load(arguments)) as job:
            train(job, request, arguments.profile)
    return None
