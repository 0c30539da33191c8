"""Every layer with a rule: sharded == plain in float64, forward and all gradients, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from credit.domain_parallel import (
    DomainParallelConv2d,
    DomainParallelGroupNorm,
    DomainParallelInterpolate,
    DomainParallelPeriodicConv2d,
    convert_to_domain_parallel,
)
from credit.models.unet_diffusion import PeriodicConv2d
from tests.domain_parallel import parity
from tests.domain_parallel.parity import check, on_ranks, ranks

MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def conv_cases(draw: Any, axes: int) -> tuple[str, tuple, dict, tuple[int, ...]]:
    kernel = tuple(draw(st.integers(1, 6 if axis == axes - 2 else 3)) for axis in range(axes))
    mode = draw(st.sampled_from(MODES))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 4 if axis == axes - 2 else 2)) for axis in range(axes))
    if padding == "same":
        stride = (1,) * axes
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": tuple(draw(st.integers(1, 2)) for _ in range(axes)),
        "padding": padding,
        "padding_mode": mode,
        "groups": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
    }
    height = draw(st.integers(6, 23))
    shape = (draw(st.integers(1, 2)), 2, *[4] * (axes - 2), height, 6)
    return f"Conv{axes}d", (2, 4), options, shape


@st.composite
def transposed_cases(draw: Any, axes: int) -> tuple[str, tuple, dict, tuple[int, ...]]:
    stride = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    options = {
        "kernel_size": tuple(draw(st.integers(1, 5)) for _ in range(axes)),
        "stride": stride,
        "dilation": dilation,
        "padding": tuple(draw(st.integers(0, 2)) for _ in range(axes)),
        "output_padding": tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
        "groups": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
    }
    shape = (1, 2, *[3] * (axes - 2), draw(st.integers(5, 17)), 4)
    return f"ConvTranspose{axes}d", (2, 4), options, shape


def rows_out(kind: str, arguments: tuple, options: dict, shape: tuple[int, ...]) -> int:
    """Rows of the plain layer's output; 0 if torch itself refuses the case."""
    try:
        y = getattr(nn, kind)(*arguments, **options)(torch.zeros(shape))
        return y.shape[-2] if y.numel() else 0
    except (RuntimeError, ValueError):
        return 0


@on_ranks
@given(size=ranks, case=conv_cases(axes=2) | conv_cases(axes=3) | transposed_cases(axes=2) | transposed_cases(axes=3))
def test_convolutions_of_any_geometry(threads, size: int, case: tuple) -> None:
    assume(min(rows_out(*case), case[3][-2]) >= size)
    check(parity.case_errors(threads(size), *case))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("height", [5, 16, 17, 31])
@pytest.mark.parametrize("kernel", [9, 15])
def test_rows_come_from_several_ranks_away_when_shards_are_lower_than_the_halo(threads, size, height, kernel) -> None:
    options = {"kernel_size": kernel, "padding": kernel // 2}
    check(parity.case_errors(threads(size), "Conv2d", (2, 2), options, (1, 2, height, 16)))


@on_ranks
@given(
    size=ranks,
    groups=st.sampled_from([1, 2, 4]),
    affine=st.booleans(),
    height=st.integers(5, 20),
    depth=st.sampled_from([(), (3,)]),
)
def test_group_norm_statistics_and_their_gradients(threads, size, groups, affine, height, depth) -> None:
    options = {"affine": affine, "eps": 1e-3}
    check(parity.case_errors(threads(size), "GroupNorm", (groups, 4), options, (2, 4, *depth, height, 6)))


@on_ranks
@given(
    size=ranks,
    mode=st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic", "area"]),
    corners=st.booleans(),
    height=st.integers(5, 20),
    target=st.integers(5, 41) | st.floats(0.8, 3.0),
)
def test_upsampling_to_a_size_or_by_a_factor(threads, size, mode, corners, height, target) -> None:
    options: dict[str, Any] = {"mode": mode}
    if mode in ("bilinear", "bicubic"):
        options["align_corners"] = corners
    options |= {"size": (target, 9)} if isinstance(target, int) else {"scale_factor": (target, 1.5)}
    case = ("Upsample", (), options, (1, 2, height, 6))
    assume(rows_out(*case) >= size)
    check(parity.case_errors(threads(size), *case))


def interpolate_errors(size: tuple[int, int], mode: str, shape: tuple[int, ...]) -> dict[str, float]:
    def convert(plain: nn.Module, manager: Any) -> nn.Module:
        return DomainParallelInterpolate(size, mode)

    return parity.errors(nn.Upsample(size, mode=mode), shape, convert)


@pytest.mark.parametrize(("mode", "size"), [("bilinear", 2), ("bilinear", 3), ("nearest", 4)])
def test_interpolate_by_itself_matches_torch(threads, mode: str, size: int) -> None:
    check(threads(size).run(interpolate_errors, (13, 9), mode, (2, 3, 7, 5)))


def periodic_errors(kernel: int, stride: int, padding: int, shape: tuple[int, ...]) -> dict[str, float]:
    torch.manual_seed(1)
    model = nn.Sequential(PeriodicConv2d(2, 3, kernel_size=kernel, stride=stride, padding=padding))

    def convert(plain: nn.Module, manager: Any) -> nn.Module:
        converters = {PeriodicConv2d: lambda m: DomainParallelPeriodicConv2d(m)}
        return convert_to_domain_parallel(plain, manager, custom_converters=converters)

    return parity.errors(model, shape, convert)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("height", [9, 16, 17])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (4, 2, 1), (1, 1, 0)])
def test_periodic_conv_reflects_at_the_poles_only(threads, size, height, kernel, stride, padding) -> None:
    if height // stride >= size:
        check(threads(size).run(periodic_errors, kernel, stride, padding, (2, 2, height, 8)))


def test_a_plain_layer_may_be_given_by_name() -> None:
    """As the names of the first parameters are."""
    conv, norm = nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 2)
    x = torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(DomainParallelConv2d(conv=conv)(x), conv(x))
    torch.testing.assert_close(DomainParallelGroupNorm(norm=norm)(x), norm(x))
    assert DomainParallelConv2d(conv=conv).weight is conv.weight
