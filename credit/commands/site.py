"""credit site: site files."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    sites = verbs.add_parser("site", help="site files").add_subparsers(title="verbs", required=True, metavar="VERB")
    parser = sites.add_parser("check", help="is a site file fit? exit code 1 if not")
    parser.add_argument("site", help="a file, my.yaml, or a name in hpc/sites")
    parser.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parser.set_defaults(verb=check)


def check(arguments: argparse.Namespace) -> int:
    from credit.findings import report
    from credit.launch.sites import examine_site

    text, code = report(examine_site(arguments.site), arguments.json)
    print(text)
    return code
