"""credit export: weights for others."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file
from credit.commands.parser import FILE
from credit.commands.verb import add_verb, load
from credit.errors import ConfigError

EXAMPLES = """examples:
  credit export my.yaml weights.safetensors
  credit export my.yaml model/
  credit export my.yaml best.pt --set forecast.checkpoint=best
"""


def add(verbs: Any) -> None:
    summary = "write the weights as one file, or a directory with all that a forecast takes"
    parser = add_verb(verbs, "export", run, summary, EXAMPLES)
    parser.add_argument(
        "--mesh",
        action="append",
        metavar="TENSORxDOMAIN",
        help="of a directory: ranks on which parity is certified; may be given again (default: 1x2 and 1x3)",
    )
    path = parser.add_argument(
        "path",
        type=file,
        help="what to write: *.safetensors; *.pt for torch.load; or a directory, with a certificate of its parity",
    )
    path.complete = FILE  # type: ignore[attr-defined]


def run(arguments: argparse.Namespace) -> None:
    from credit.checks.certificate import MESHES, certify
    from credit.evaluation.export import export
    from credit.launch.job import start_job

    meshes = [mesh_of(one) for one in arguments.mesh or ()] or MESHES
    with start_job(lambda: load(arguments)) as job:
        facts, first = export(job, arguments.path), job.is_first
    if first and not arguments.path.suffix:
        certify(arguments.path, facts, meshes, trust=True)


def mesh_of(text: str) -> tuple[int, int]:
    """(tensor, domain) of a text such as 2x3.

    Raises:
        ConfigError: if it is not like that.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) < 65 for part in parts):
        raise ConfigError(f"--mesh {text!r}: write ranks of tensor and domain, like 1x3")
    return int(parts[0]), int(parts[1])
