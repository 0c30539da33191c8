"""Averaged weights: the formula, and the model that computes with them, sharded or not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from credit.models import DOMAIN_CONVERTERS
from credit.parallel import get_raw_model
from credit.parallel.ema import EMA
from credit.parallel.mesh import build_device_mesh
from credit.parallel.parallelize import parallelize
from credit.parallel.pieces import in_pieces, whole
from tests.parallel.curves import CHANNELS, HEIGHT, WIDTH, Transformer, conf


def test_the_average_is_the_sum_of_the_weights_with_decaying_shares() -> None:
    model = nn.Linear(3, 2).double()
    seen = [model.weight.detach().clone()]
    ema = EMA(model, 0.5)
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.add_(float(step))
        seen.append(model.weight.detach().clone())
        ema.update(step)
    decays = [*((1 + step) / (10 + step) for step in range(1, 9)), *[0.5] * 4]  # 9 / 18 at step 8
    shares = [math.prod(decays), *((1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(12))]
    assert sum(shares) == pytest.approx(1, rel=1e-14)
    assert shares[0] < 1e-4  # of the initial weights
    wanted = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    torch.testing.assert_close(ema.average["weight"], wanted, rtol=1e-14, atol=0)


def outputs(given: dict) -> tuple[float, float]:
    """How far the model with averaged weights is from the plain one with these, and after it with its own again."""
    mesh, _ = build_device_mesh(given["trainer"]["parallelism"], "cpu")
    torch.manual_seed(0)
    plain = Transformer().double()
    model = parallelize(copy.deepcopy(plain), mesh, given, None, DOMAIN_CONVERTERS)
    x = torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    for step in range(1, 3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

    def error(values: dict) -> float:
        weights = {name: whole(value).detach() for name, value in in_pieces(model, values).items()}
        with torch.no_grad():
            return float((model(x) - functional_call(plain, weights, x)).abs().max())

    averaged = {name: value.clone() for name, value in ema.average.items()}
    with torch.no_grad():
        model(x)  # leaves gathered weights behind
    with ema.in_place_of_weights():
        inside = error(averaged)
    return inside, error(dict(get_raw_model(model).named_parameters()))


@pytest.mark.parametrize(("mode", "tp"), [("ddp", 1), ("fsdp2 over dp", 1), ("fsdp2 over dp", 2)])
def test_a_model_computes_with_the_average_and_then_with_its_own_weights(worlds, mode: str, tp: int) -> None:
    for inside, after in worlds(4).run(outputs, conf(mode, tp, 1)):
        assert inside < 1e-12
        assert after < 1e-12
