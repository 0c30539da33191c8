"""Pangu on any mesh == Pangu; and what its windows mean, from the definition, point by point."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from credit.models.attention import EarthAttention
from credit.models.pangu import Pangu
from tests.models import parity

UPPER, LEVELS, SURFACE, GIVEN = 2, 3, 1, 2
CHANNELS = (UPPER * LEVELS + SURFACE + GIVEN, UPPER * LEVELS + SURFACE)
SMALL = {"upper": UPPER, "levels": LEVELS, "width": 8, "depth": 2, "coarse_depth": 2, "heads": 2}
WINDOWS = {"window": (2, 3, 2), "patch": (2, 2, 2)}


@pytest.mark.parametrize(("tp", "domain"), parity.DOMAINS)
@pytest.mark.parametrize("height", parity.HEIGHTS)
def test_sharded_equals_plain(height: int, tp: int, domain: int) -> None:
    assert not parity.errors("pangu", CHANNELS, (height, 16), tp, domain, **SMALL, **WINDOWS)


OTHERS = {
    "no coarse grid": {"coarse_depth": 0},
    "large cubes": {"patch": (3, 4, 4), "window": (2, 2, 2)},
    "windows higher than the grid": {"window": (4, 30, 4)},
    "single points": {"window": (1, 1, 1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_windows_and_cubes_are_exact(name: str) -> None:
    options = {**SMALL, **WINDOWS, **OTHERS[name]}
    assert not parity.errors("pangu", CHANNELS, (19, 16), 2, 2, **options)


WINDOW = (2, 2, 2)


def dense_bias(attention: EarthAttention, grid: tuple[int, ...]) -> Tensor:
    """The bias between any two points of a grid, (heads, points, points), from the definition; -inf for unseen."""
    points = list(itertools.product(*map(range, grid)))
    bias = torch.full((attention.heads, len(points), len(points)), -torch.inf, dtype=torch.float64)
    z_size, y_size, x_size = WINDOW
    z_shift, y_shift, x_shift = attention.shift
    windows = [-(-length // size) for length, size in zip(grid, WINDOW, strict=True)]
    padded = [n * size for n, size in zip(windows, WINDOW, strict=True)]
    for (i, a), (j, b) in itertools.product(enumerate(points), repeat=2):
        # Where a point lies once the grid is shifted; in longitude around the globe.
        (za, ya, xa), (zb, yb, xb) = (
            ((z - z_shift) % padded[0], (y - y_shift) % padded[1], (x - x_shift) % padded[2]) for z, y, x in (a, b)
        )
        if (za // z_size, ya // y_size, xa // x_size) != (zb // z_size, yb // y_size, xb // x_size):
            continue
        if (a[0] < z_shift) != (b[0] < z_shift) or (a[1] < y_shift) != (b[1] < y_shift):
            continue  # brought together from both ends
        kind = za // z_size * windows[1] + ya // y_size
        pair = za % z_size * z_size + zb % z_size
        pair = (pair * y_size + ya % y_size) * y_size + yb % y_size
        pair = pair * (2 * x_size - 1) + xa % x_size - xb % x_size + x_size - 1
        bias[:, i, j] = attention.bias[kind, :, pair]
    return bias


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(3, 5, 4), (4, 6, 4)], ids=["padded", "whole windows"])
def test_windows_are_attention_of_all_points_with_a_bias(grid: tuple[int, int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attention = EarthAttention(4, 2, grid, WINDOW, shifted).double()
    torch.nn.init.normal_(attention.bias)
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    wanted = attention.attend(x.flatten(1, 3), dense_bias(attention, grid)).view(x.shape)
    torch.testing.assert_close(attention(x), wanted, rtol=0, atol=1e-12)


def test_longitude_has_no_seam() -> None:
    """Fields turned around the globe by whole windows give the forecast turned."""
    torch.manual_seed(0)
    model = Pangu(*CHANNELS, (19, 16), **SMALL, **WINDOWS).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, CHANNELS[0], 19, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x.roll(8, -1)), model(x).roll(8, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("channels", "longitudes", "message"),
    [(5, 16, "model.upper 2 x model.levels 3 are more than 5"), (7, 12, "12 longitudes do not divide into")],
)
def test_what_does_not_fit_is_refused(channels: int, longitudes: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Pangu(channels, channels, (19, longitudes), **SMALL, **WINDOWS)
