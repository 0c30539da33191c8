"""credit site: site files."""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.parser import FILE, add_parser

EXAMPLES = """examples:
  credit site check my.yaml
  credit site check derecho --json
"""


def add(verbs: Any) -> None:
    sites = add_parser(verbs, "site", "look at site files", EXAMPLES).add_verbs()
    parser = add_parser(sites, "check", "look whether a site file is fit; exit code 1 if it is not", EXAMPLES)
    site = parser.add_argument("site", help="a file, my.yaml, or a name in hpc/sites")
    site.complete = FILE  # type: ignore[attr-defined]
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=check)


def check(arguments: argparse.Namespace) -> int:
    from credit.commands.findings import show
    from credit.launch.sites import examine_site

    return show(examine_site(arguments.site), arguments.json)
