"""credit completion: what a shell completes."""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.parser import add_parser
from credit.errors import CreditError

EXAMPLES = """examples:
  credit completion bash > ~/.local/share/bash-completion/completions/credit
  credit completion zsh > ~/.zfunc/_credit
"""


def add(verbs: Any) -> None:
    parser = add_parser(verbs, "completion", "print what makes a shell complete verbs, options and files", EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script is printed")
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError:
        raise CreditError("the package shtab is not installed", fix="pip install 'credit-hpc[completion]'") from None
    print(shtab.complete(arguments.top, arguments.shell))
