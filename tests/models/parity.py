"""A model on a mesh == the plain model: output, gradients of the input and of every parameter, buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from credit.checks.parity import place_in
from credit.config.models import MODELS
from credit.domain_parallel.parity import verify_parity_at
from credit.models import DOMAIN_CONVERTERS, load_model_class
from tests.parallel import curves

DOMAINS = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
"""(tp, domain)"""
HEIGHTS = [19, 37, 181]


def errors(name: str, channels: tuple[int, int], grid: tuple[int, int], tp: int, domain: int, **options: Any) -> dict:
    """Relative errors that are not below 1e-9, in float64; the ranks are threads."""
    torch.manual_seed(0)
    model = load_model_class(MODELS[name].path)(*channels, grid, **options)
    return wrong(model, (torch.randn(2, channels[0], *grid),), tp, domain)


def wrong(model: nn.Module, inputs: tuple[Tensor, ...], tp: int, domain: int) -> dict[str, float]:
    report = verify_parity_at(
        lambda world: place_in(world, tp, domain), model, inputs, tp * domain, custom_converters=DOMAIN_CONVERTERS
    )
    assert report.ranks == domain
    return {key: error for key, error in report.errors.items() if not error < 1e-9}


def curve(build: type[nn.Module], mode: str, tp: int, domain: int) -> dict[str, Tensor]:
    """What `curves` compares, of a model for its fields."""
    curves.MODELS["another"] = build
    try:
        found = curves.curve("another", curves.conf(mode, tp, domain))
    finally:
        del curves.MODELS["another"]
    return {key: value for key, value in found.items() if not key.startswith("buffer")}


def curve_errors(build: type[nn.Module], mode: str, tp: int, domain: int, wanted: dict) -> dict[str, float]:
    return curves.worst(curve(build, mode, tp, domain), wanted)
