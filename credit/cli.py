"""The command `credit`, also `python -m credit`. Verbs import what they need, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from credit.boundary import bounded
from credit.commands import GROUPS
from credit.commands.parser import Parser

SUMMARY = "Train weather models over a mesh of devices (dp, tp, domain), with the numbers of one device."
EXAMPLES = """examples:
  credit init quickstart
  torchrun --nproc-per-node 4 -m credit train configs/quickstart.yaml
  torchrun --nproc-per-node 4 -m credit forecast configs/quickstart.yaml
  credit score configs/quickstart.yaml
  credit report configs/quickstart.yaml
  credit check my.yaml --ranks 16

`credit VERB --help` has options and more examples.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 if a check fails; otherwise see `credit.boundary.bounded`.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["check"] and given[1:] and given[1] not in ("parity", "config", "-h", "--help"):
        given = ["check", "config", *given[1:]]
    arguments = parser().parse_args(given)
    return bounded(lambda: arguments.verb(arguments))


def parser() -> Parser:
    """Of all verbs."""
    top = _Top(prog="credit")
    top.set_defaults(top=top)
    top.add_argument("--version", action=_Version, nargs=0, help="versions and devices")
    verbs = top.add_verbs()
    for modules in GROUPS.values():
        for module in modules:
            module.add(verbs)
    return top


class _Top(Parser):
    """Its help has the verbs in groups."""

    def format_help(self) -> str:
        lines = ["usage: credit VERB ...", "", SUMMARY]
        for group, modules in GROUPS.items():
            names = [module.__name__.rsplit(".")[-1] for module in modules]
            lines += ["", f"{group}:"]
            for name in names:
                lines.append(f"  {name:<11} {self.verbs[name].description}")
                lines += [f"    {one:<9} {parser.description}" for one, parser in self.verbs[name].verbs.items()]
        options = ["  -h, --help  this text", "  --version   versions and devices"]
        return "\n".join([*lines, "", "options:", *options, "", EXAMPLES])


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from credit.launch.doctor import devices, versions

        print(*(one.message for one in (*versions(), *devices())), sep="\n")
        parser.exit()
