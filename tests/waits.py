"""Where a step would make the host wait for a GPU: counted on the CPU, by the line of ours that does it.

The host waits where it reads a number of a tensor (`.item()`, `.tolist()`, `if x`, `nonzero`, whose size is one), and
where a tensor is made of numbers of the host, which is copied to the device from memory that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import credit
from credit.domain_parallel.outcome import tensors_in

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
READS |= {"aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"}
MAKES = {"aten::lift_fresh", "aten::lift_fresh_copy"}
BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_"}
OF_PYTHON = {"tolist", "numpy", "cpu"}
HERE = str(Path(credit.__file__).parent) + "/"


class Waits(TorchDispatchMode):
    """Context: `found` counts by "file:function" within credit.

    Args:
        on_host: places that work with what is on the host anyway.
    """

    def __init__(self, on_host: Container[str] = ()) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._on_host, self._functions = on_host, _Functions(self)

    def __enter__(self) -> Any:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in READS | MAKES or (name in BY_MASK and any(x.dtype == torch.bool for x in tensors_in(args[1]))):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        place = _place()
        if place not in self._on_host:
            self.found[place] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in OF_PYTHON:
            self._waits.note()
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost function of ours, and that of torch's optimisers if it is below."""
    frame, below = sys._getframe(2), ""
    while frame is not None and not frame.f_code.co_filename.startswith(HERE):
        if "/torch/optim/" in frame.f_code.co_filename:
            below = "torch/optim"
        frame = frame.f_back
    if frame is None:
        return below or "nobody of ours"
    return below or f"{frame.f_code.co_filename.removeprefix(HERE)}:{frame.f_code.co_name}"
