"""Functions that were compiled run as they are written while a converted model runs: no compiler can trace slabs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_stance = ExitStack()
_running: list[None] = []
"""One for each rank of this process that is in a forward: ranks that are threads come and go in any order."""


@contextmanager
def as_written() -> Iterator[None]:
    """While it lasts, nothing is compiled, and what is compiled already is not used."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    if not _running:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _running.append(None)
    try:
        yield
    finally:
        _running.pop()
        if not _running:
            _stance.close()
