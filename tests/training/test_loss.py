"""The loss: formulas written out in numpy, summed over uneven shards, and one curve on every mesh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from credit.config import Loss
from credit.data.grid import Grid
from credit.data.store import Channel
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError
from credit.training.loss import NO_WAVE, LatitudeWeightedLoss, zonal_amplitudes
from tests.training.runs import curve, on, small

CHANNELS = [Channel("t2m"), Channel("z", 500.0), Channel("z", 850.0)]
WEIGHTS = {"variables": {"z": 2.0}, "levels": {500.0: 3.0, 850.0: 0.25}}
OPTIONS = [
    {"kind": "mse"},
    {"kind": "mae"},
    {"kind": "huber", "delta": 0.7},
    {"kind": "mse", **WEIGHTS},
    {"kind": "mae", "spectral": 0.3},
    {"kind": "huber", "spectral": 1.5, **WEIGHTS},
    {"kind": "crps", "members": 2},
    {"kind": "crps", "members": 5, "spectral": 0.5, **WEIGHTS},
]


def grid(latitudes: int, longitudes: int) -> Grid:
    return Grid(np.linspace(90, -90, latitudes), np.arange(longitudes) * 360 / longitudes)


def fields(
    seed: int, latitudes: int, longitudes: int, members: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(CHANNELS), latitudes, longitudes)
    prediction, target = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in (2 * members, 2))
    return prediction, target, torch.tensor([1.0, 0.5], dtype=torch.float64)


def written_out(options: Loss, on: Grid, prediction: np.ndarray, target: np.ndarray, sample_weight: np.ndarray):
    prediction, target = prediction.reshape(2, -1, *target.shape[1:]), target[:, None]
    error = np.abs(prediction - target)
    count = error.shape[1]
    apart = np.abs(prediction[:, :, None] - prediction[:, None]).sum(axis=(1, 2)) / max(count * (count - 1), 1)
    of_any = np.abs(prediction[:, :, None] - prediction[:, None]).mean(axis=(1, 2))
    crps = error - (0.95 * apart + 0.05 * of_any)[:, None] / 2
    small = error <= options.delta
    huber = np.where(small, error**2 / 2, options.delta * (error - options.delta / 2))
    of_cells = {"mse": error**2, "mae": error, "huber": huber, "crps": crps}[options.kind].mean(axis=-1)
    wave, longitudes = np.arange(target.shape[-1]), target.shape[-1]
    without_conjugate = (wave == 0) | (2 * wave == longitudes)
    no_wave = NO_WAVE**2 / np.where(without_conjugate, 1, 2)
    waves = [np.sqrt(np.abs(np.fft.fft(field) / longitudes) ** 2 + no_wave) for field in (prediction, target)]
    amplitudes = ((waves[0] - waves[1]) ** 2).sum(axis=-1)  # of both the wave and its conjugate
    of_rows = of_cells + options.spectral * amplitudes
    channel = np.array([options.variables.get(c.variable, 1) * options.levels.get(c.level, 1) for c in CHANNELS])
    of_samples = np.einsum("bmcr,c,r->b", of_rows / count, channel / channel.sum(), on.latitude_weights() / on.shape[0])
    return (of_samples * sample_weight).sum()


@settings(max_examples=60, deadline=None)
@given(
    latitudes=st.integers(2, 37),
    longitudes=st.integers(2, 12),
    parts=st.integers(1, 5),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 99),
)
def test_shares_of_uneven_slabs_add_up_to_the_formula(latitudes, longitudes, parts, options, seed) -> None:
    """And so do the gradients: a slab's is the slab of the whole's."""
    parts = min(parts, latitudes)
    loss, globe = Loss(**options), grid(latitudes, longitudes)
    prediction, target, weight = fields(seed, latitudes, longitudes, loss.ensemble)
    whole = prediction.clone().requires_grad_()
    LatitudeWeightedLoss(loss, globe, range(latitudes), CHANNELS)(whole, target, weight).backward()
    total = 0.0
    for rank in range(parts):
        rows = Partition(latitudes, parts).range(rank)
        mine = slice(rows.start, rows.stop)
        slab = prediction[:, :, mine].clone().requires_grad_()
        share = LatitudeWeightedLoss(loss, globe, rows, CHANNELS)(slab, target[:, :, mine], weight)
        share.backward()
        torch.testing.assert_close(slab.grad, whole.grad[:, :, mine], rtol=1e-12, atol=1e-15)
        total += share.item()
    expected = written_out(loss, globe, prediction.numpy(), target.numpy(), weight.numpy())
    assert total == pytest.approx(expected, rel=1e-9)


def test_the_default_is_the_plain_mean_square_bit_for_bit() -> None:
    globe = grid(13, 16)
    for dtype in (torch.float32, torch.float64):
        prediction, target, weight = (part.to(dtype) for part in fields(0, 13, 16))
        area = (torch.from_numpy(globe.latitude_weights())[:, None] / (13 * 16)).to(dtype)
        plain = (((prediction - target).square().mean(dim=1) * area).sum(dim=(-2, -1)) * weight).sum()
        for options in (Loss(), Loss(variables={"z": 1.0}), Loss(variables={"t2m": 5.0, "z": 5.0})):
            found = LatitudeWeightedLoss(options, globe, range(13), CHANNELS)(prediction, target, weight)
            assert torch.equal(found, plain)


@pytest.mark.parametrize("longitudes", [7, 8])
def test_amplitudes_know_the_power_and_nothing_of_the_phase(longitudes) -> None:
    prediction, target, _ = fields(1, 5, longitudes)
    power = zonal_amplitudes(prediction).square().sum(dim=-1)
    torch.testing.assert_close(power, prediction.square().mean(dim=-1), rtol=1e-9, atol=0)
    turned = zonal_amplitudes(prediction.roll(3, dims=-1))
    torch.testing.assert_close(turned, zonal_amplitudes(prediction), rtol=1e-9, atol=1e-12)
    apart = (zonal_amplitudes(prediction) - zonal_amplitudes(target)).square().sum(dim=-1)
    assert (apart <= (prediction - target).square().mean(dim=-1) * (1 + 1e-12)).all()


def test_a_field_without_waves_has_a_gradient() -> None:
    field = torch.zeros(1, 1, 2, 8, requires_grad=True)
    zonal_amplitudes(field).sum().backward()
    assert torch.isfinite(field.grad).all()


def test_a_weight_of_zero_leaves_a_channel_out_and_the_scale_of_weights_does_not_count() -> None:
    prediction, target, weight = fields(2, 5, 8)

    def loss(**options) -> float:
        return LatitudeWeightedLoss(Loss(**options), grid(5, 8), range(5), CHANNELS)(prediction, target, weight).item()

    alone = LatitudeWeightedLoss(Loss(), grid(5, 8), range(5), CHANNELS[:1])
    assert loss(variables={"z": 0}) == pytest.approx(alone(prediction[:, :1], target[:, :1], weight).item(), rel=1e-12)
    assert loss(variables={"z": 2, "t2m": 4}) == pytest.approx(loss(variables={"t2m": 2}), rel=1e-12)
    with pytest.raises(ConfigError, match="the weights of variables and levels leave no channel above 0"):
        loss(variables={"t2m": 0}, levels={500.0: 0, 850.0: 0})


@pytest.mark.parametrize(
    "options",
    [{"kind": "huber", "delta": 0.5, "spectral": 0.5, "variables": {"a": 3.0}}, {"kind": "mae", "variables": {"b": 0}}],
    ids=["huber", "mae"],
)
def test_every_mesh_gives_the_curve_of_one_process(worlds, tmp_path, options) -> None:
    raw = small(tmp_path)
    raw["trainer"].update(loss=options, rollout=2, epochs=1)
    losses, valid, norms = curve(on(raw, tmp_path / "alone", "none", 1))
    for size, data, domain in ((3, "none", 3), (4, "ddp", 2)):
        for found in worlds(size).run(curve, on(raw, tmp_path / f"{size}", data, domain)):
            assert found[0] == pytest.approx(losses, rel=1e-9, abs=0)
            assert found[1] == pytest.approx(valid, rel=1e-9, abs=0)
            assert found[2] == pytest.approx(norms, rel=1e-8, abs=0)
