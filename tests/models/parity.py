"""A model on a mesh == the plain model: output, gradients of the input and of every parameter. Runs on ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from credit.domain_parallel import verify_parity
from credit.models import DOMAIN_CONVERTERS, MODELS
from credit.training.check import CutChannels
from tests.parallel import test_one_curve as one_curve
from tests.parallel.test_tensor_parallel import manager, mesh

DOMAINS = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
"""(tp, domain)"""
HEIGHTS = [19, 37, 181]


def errors(name: str, channels: tuple[int, int], grid: tuple[int, int], tp: int, domain: int, **options: Any) -> dict:
    """Relative errors that are not below 1e-9, in float64."""
    torch.manual_seed(0)
    model = MODELS[name](*channels, grid, **options)
    return wrong(model, (torch.randn(2, channels[0], *grid),), tp, domain)


def wrong(model: nn.Module, inputs: tuple[Tensor, ...], tp: int, domain: int) -> dict[str, float]:
    cut = CutChannels(mesh(tp, domain)["tp"]) if tp > 1 else None
    report = verify_parity(model, inputs, manager(tp, domain), custom_converters=DOMAIN_CONVERTERS, cut=cut)
    return {key: error for key, error in report.errors.items() if not error < 1e-9}


def curve(build: type[nn.Module], mode: str, tp: int, domain: int) -> dict[str, Tensor]:
    """What `test_one_curve` compares, of a model for its fields."""
    one_curve.MODELS["another"] = build
    try:
        found = one_curve.curve("another", one_curve.conf(mode, tp, domain))
    finally:
        del one_curve.MODELS["another"]
    return {key: value for key, value in found.items() if not key.startswith("buffer")}


def curve_errors(build: type[nn.Module], mode: str, tp: int, domain: int, wanted: dict) -> dict[str, float]:
    return one_curve.worst(curve(build, mode, tp, domain), wanted)
