"""From any launcher to ranks on a mesh, checked before the first step. Imports no torch until it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from credit.launch.contract import enforce_sampler_contract
    from credit.launch.job import start_job
    from credit.launch.rendezvous import join
    from credit.launch.submission import submit

__all__ = ["enforce_sampler_contract", "join", "start_job", "submit"]

_MODULES = {
    "enforce_sampler_contract": "contract",
    "join": "rendezvous",
    "start_job": "job",
    "submit": "submission",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
