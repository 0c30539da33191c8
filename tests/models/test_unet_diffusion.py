"""The diffusion U-Net on any mesh == the diffusion U-Net; converted as the reference does it, too."""

from __future__ import annotations

import pytest
import torch

from credit.domain_parallel.thread_ranks import ThreadWorld
from credit.models.unet_diffusion import DiffusionUNet, sinusoids
from tests.domain_parallel.parity import check, departures, expected
from tests.models import parity

CHANNELS = (5, 3)
SMALL = {"width": 8, "levels": 2, "groups": 4, "heads": 2}


@pytest.mark.parametrize(("tp", "domain"), parity.DOMAINS)
@pytest.mark.parametrize("height", parity.HEIGHTS)
def test_sharded_equals_plain(height: int, tp: int, domain: int) -> None:
    assert not parity.errors("unet_diffusion", CHANNELS, (height, 8), tp, domain, **SMALL)


@pytest.mark.parametrize(("tp", "domain"), [(1, 3), (2, 2)])
def test_a_given_time_is_the_same_for_all_ranks(tp: int, domain: int) -> None:
    torch.manual_seed(0)
    x, time = torch.randn(2, CHANNELS[0], 19, 8), torch.tensor([3.0, 700.0])
    assert not parity.wrong(DiffusionUNet(*CHANNELS, (19, 8), **SMALL), (x, time), tp, domain)


def converted_as_in_the_reference(model: torch.nn.Module, manager) -> torch.nn.Module:
    from credit.domain_parallel import convert_to_domain_parallel
    from credit.domain_parallel.layers import DomainParallelPeriodicConv2d
    from credit.models.unet_diffusion import PeriodicConv2d

    converted = convert_to_domain_parallel(
        model, manager,
        custom_converters={
            PeriodicConv2d: lambda m: DomainParallelPeriodicConv2d(m),
        }
    )  # fmt: skip
    layers = [module for module in converted.modules() if isinstance(module, PeriodicConv2d)]
    assert layers
    assert all(isinstance(layer, DomainParallelPeriodicConv2d) for layer in layers)
    return converted


@pytest.mark.parametrize("size", [2, 3])
def test_the_conversion_of_the_reference_runs_as_written(size: int) -> None:
    torch.manual_seed(0)
    model = DiffusionUNet(*CHANNELS, (37, 8), **SMALL)
    torch.nn.init.normal_(model.head.conv.weight, std=0.1)
    found = expected(model, (2, CHANNELS[0], 37, 8))
    check(ThreadWorld(size).run(departures, found, converted_as_in_the_reference))


def test_forecasts_are_those_at_time_zero_and_depend_on_the_time() -> None:
    torch.manual_seed(0)
    model = DiffusionUNet(*CHANNELS, (19, 8), **SMALL)
    torch.nn.init.normal_(model.head.conv.weight, std=0.1)
    x = torch.randn(2, CHANNELS[0], 19, 8)
    assert torch.equal(model(x), model(x, torch.zeros(2)))
    assert not torch.allclose(model(x), model(x, torch.tensor([0.0, 500.0])))


def test_sinusoids_are_those_of_the_paper() -> None:
    time, channel = torch.tensor([0.0, 7.0, 999.0]), torch.arange(4)
    angles = time[:, None] / 10000 ** (2 * channel / 8)
    torch.testing.assert_close(sinusoids(time, 8), torch.cat([angles.sin(), angles.cos()], 1))


def test_longitudes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="10 longitudes do not halve 2 times"):
        DiffusionUNet(*CHANNELS, (19, 10), **SMALL)
