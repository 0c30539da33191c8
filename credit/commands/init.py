"""credit init: files to start from."""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.parser import add_parser

EXAMPLES = """examples:
  credit init                               list what there is
  credit init quickstart                    quickstart.yaml
  credit init wxformer_1deg --site lumi     wxformer_1deg.yaml, lumi.sh, and lumi.yaml, from which that is written
  credit init --site my.yaml                my.sh, from a site file of your own
  credit init --container                   credit-image/; then credit-image/containers/build.sh sif
"""


def add(verbs: Any) -> None:
    summary = "write files to start from into the working directory; alone: list them"
    parser = add_parser(verbs, "init", summary, EXAMPLES)
    parser.add_argument("name", nargs="?", help="of a config, such as quickstart")
    parser.add_argument("--site", default=None, help="also the job script of a site, or of a site file of your own")
    parser.add_argument("--container", action="store_true", help="also the sources of an image of this credit")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> None:
    from credit.init import init, listing

    if arguments.name is None and arguments.site is None and not arguments.container:
        print(listing())
        return
    print("wrote", *init(arguments.name, arguments.site, arguments.container, arguments.force))
