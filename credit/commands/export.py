"""credit export: weights for others."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file
from credit.commands.parser import FILE
from credit.commands.verb import add_verb, load

EXAMPLES = """examples:
  credit export my.yaml weights.safetensors
  credit export my.yaml best.pt --set forecast.checkpoint=best
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "export", run, "write the weights as one plain state dict", EXAMPLES)
    path = parser.add_argument(
        "path", type=file, help="the file to write, *.safetensors, or *.pt for torch.load; for trainer.init_from, too"
    )
    path.complete = FILE  # type: ignore[attr-defined]


def run(arguments: argparse.Namespace) -> None:
    from credit.evaluation.export import export
    from credit.launch.job import start_job

    with start_job(lambda: load(arguments)) as job:
        export(job, arguments.path)
