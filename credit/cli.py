"""The command `credit`, also `python -m credit`. Verbs import what they need, so that --help is quick."""

from __future__ import annotations

import argparse
import sys

from credit import __version__
from credit.boundary import bounded
from credit.commands import VERBS

EXAMPLES = """examples:
  credit init quickstart
  credit train configs/era5_sample.yaml
  torchrun --nproc-per-node 4 -m credit train configs/quickstart.yaml
  torchrun --nproc-per-node 2 -m credit forecast configs/quickstart.yaml --set trainer.parallelism.data=none
  credit score configs/quickstart.yaml
  credit forecast my.yaml --start latest --lead 5d
  credit check my.yaml --ranks 16
  credit check parity my.yaml --ranks 4
  credit submit my.yaml --site derecho --nodes 4 --dry-run
  credit plan my.yaml --gpus 16 --gpu-memory 40
  credit migrate theirs.yml my.yaml
  credit data describe era5.zarr
  credit data stats my.yaml
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 if a check fails; otherwise see `credit.boundary.bounded`.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["check"] and given[1:] and given[1] not in ("parity", "config", "-h", "--help"):
        given = ["check", "config", *given[1:]]
    arguments = _parser().parse_args(given)
    return bounded(lambda: arguments.verb(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="credit",
        description="Train weather models over a mesh of devices (dp, tp, domain), with the numbers of one device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"credit {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
