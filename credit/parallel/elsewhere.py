"""Names of the reference API that are not here: importing one says what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from credit.errors import CreditError

_GROUP = "mesh['dp'].get_group() of the mesh that build_device_mesh returns: no group is kept in a global"

INSTEAD = {
    "credit.parallel.tensor_parallel": {
        "apply_native_tensor_parallel": "apply_tensor_parallel: it cuts nn.Linear and 1x1 nn.Conv2d into DTensors",
        "supports_native_tp": "apply_tensor_parallel: it refuses a model that it cannot cut before anything is changed",
    },
    "credit.parallel.mesh": {"register_dp_group": _GROUP, "get_dp_group": _GROUP},
}
"""By module."""


class NotHereError(CreditError, ImportError):
    """A name of the reference API that this package does not have. Names what to use."""


def refused(module: str) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module.

    Raises:
        NotHereError: for the names in `INSTEAD`.
        AttributeError: for all others.
    """

    def __getattr__(name: str) -> NoReturn:
        if name in INSTEAD[module]:
            raise NotHereError(f"{name} of the reference API is not here", module, f"use {INSTEAD[module][name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
