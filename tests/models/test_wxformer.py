"""WXFormer: on every mesh the numbers of one process, output, input gradient and all parameter gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from credit.domain_parallel import (
    DomainParallelManager,
    SharedHalo,
    convert_to_domain_parallel,
    gather_tensor,
    shard_tensor,
)
from credit.models import DOMAIN_CONVERTERS
from credit.models.attention import DynamicPositionBias, WindowAttention
from credit.models.spectral_norm import SpectralNorm, normalize_weights
from credit.models.sphere import pad_on_sphere
from credit.models.wxformer import DECODERS, CrossEmbedLayer, WXFormer
from credit.parallel import get_raw_model
from credit.parallel.mesh import build_device_mesh, data_parallel_coords
from credit.parallel.parallelize import parallelize, reduce_gradients
from credit.parallel.pieces import in_pieces, whole
from tests.domain_parallel import parity
from tests.models import parity as on_mesh

IN, OUT, COLUMNS, BATCH = 3, 2, 12, 2
TOLERANCE = 1e-9
SMALL: dict[str, Any] = {
    "widths": (8, 16),
    "depths": (1, 1),
    "kernels": ((4, 8, 16, 32), (2, 4)),
    "strides": (2, 2),
    "local_window": 3,
    "global_windows": (2, 3),
    "head_width": 4,
    "ratio": 2,
    "groups": 2,
}
CASES = [(decoder, spectral_norm) for decoder in DECODERS for spectral_norm in (False, True)]


def build(height: int, decoder: str = "transposed", spectral_norm: bool = False, **more: Any) -> WXFormer:
    """With weights that are nowhere zero, so that every gradient counts."""
    torch.manual_seed(0)
    options = {**SMALL, "decoder": decoder, "spectral_norm": spectral_norm, **more}
    model = WXFormer(IN, OUT, (height, COLUMNS), **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.count_nonzero() == 0 else parameter.data.mul_(1.1)
    return model


@cache
def layout(data: str, tp: int, domain: int) -> tuple[DeviceMesh | None, DomainParallelManager]:
    mesh, _ = build_device_mesh({"data": data, "tensor": tp, "domain": domain}, "cpu")
    return mesh, DomainParallelManager.from_mesh(mesh)


def errors(height: int, decoder: str, spectral_norm: bool, tp: int, domain: int, trainer: Any) -> dict[str, float]:
    """Relative errors on the mesh (dp is what the world leaves over) against the plain model on the whole globe."""
    data = trainer.get("data", "none")
    conf = {"trainer": {**trainer, "parallelism": {"data": data, "tensor": tp, "domain": domain}}}
    mesh, manager = layout("none" if data == "none" else "ddp", tp, domain)
    dp_rank, dp_size = data_parallel_coords(conf)
    plain = build(height, decoder, spectral_norm)
    torch.manual_seed(1)
    x = torch.randn(BATCH, IN, height, COLUMNS, dtype=torch.float64, requires_grad=True)
    y = plain(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)

    def mine(t: Tensor) -> Tensor:
        return shard_tensor(t.detach().chunk(dp_size)[dp_rank], -2, manager)

    model = parallelize(build(height, decoder, spectral_norm), mesh, conf, manager, DOMAIN_CONVERTERS)
    ours = mine(x).clone().requires_grad_()
    output = model(ours)
    ranks = dp_size * domain  # gradients are averaged over these
    (output * mine(cotangent)).sum().mul(ranks).backward()
    reduce_gradients(model, mesh, conf)
    gradients = {name: p.grad for name, p in get_raw_model(model).named_parameters()}
    gradients = {name: whole(gradient) for name, gradient in in_pieces(model, gradients).items()}
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    assert gradients.keys() == wanted.keys()
    assert all(gradient.count_nonzero() for gradient in wanted.values())
    buffers = dict(plain.named_buffers())
    return {
        "output": parity.relative(output, mine(y)),
        "input": parity.relative(ours.grad / ranks, mine(x.grad)),
        **{name: parity.relative(gradients[name], gradient) for name, gradient in wanted.items()},
        **{name: parity.relative(buffer, buffers[name]) for name, buffer in get_raw_model(model).named_buffers()},
    }


def too_large(*case: Any) -> dict[str, float]:
    return {name: error for name, error in errors(*case).items() if not error < TOLERANCE}


@pytest.mark.parametrize(("decoder", "spectral_norm"), CASES)
@pytest.mark.parametrize(("tp", "domain"), [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2)])
def test_sharded_is_plain(decoder: str, spectral_norm: bool, tp: int, domain: int) -> None:
    height = 19 if decoder == "transposed" else 37
    model = build(height, decoder, spectral_norm)
    assert not on_mesh.wrong(model, (torch.randn(BATCH, IN, height, COLUMNS),), tp, domain)


@pytest.mark.parametrize(("decoder", "spectral_norm"), CASES)
def test_sharded_is_plain_on_processes(worlds, decoder: str, spectral_norm: bool) -> None:
    assert worlds(4).run(too_large, 19, decoder, spectral_norm, 2, 2, {}) == [{}] * 4


@pytest.mark.parametrize(
    ("decoder", "spectral_norm", "trainer"),
    [
        ("transposed", False, {"data": "ddp"}),
        ("pixel_shuffle", True, {"data": "ddp"}),
        ("transposed", True, {"data": "fsdp2", "activation_checkpointing": True}),
        ("pixel_shuffle", False, {"data": "fsdp2"}),
    ],
)
def test_sharded_is_plain_on_a_mesh_of_all_three(worlds, decoder: str, spectral_norm: bool, trainer: dict) -> None:
    assert worlds(8).run(too_large, 19, decoder, spectral_norm, 2, 2, trainer) == [{}] * 8


def test_sharded_is_plain_at_one_degree() -> None:
    assert not on_mesh.wrong(build(181, "transposed", True), (torch.randn(BATCH, IN, 181, COLUMNS),), 1, 4)


def recomputed(spectral_norm: bool) -> dict[str, float]:
    return too_large(19, "transposed", spectral_norm, 1, 1, {"activation_checkpointing": True})


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_activations_computed_again_are_the_same(worlds, spectral_norm: bool) -> None:
    assert worlds(1).run(recomputed, spectral_norm) == [{}]


# Messages


class Embedded(nn.Module):
    def __init__(self, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.embed = CrossEmbedLayer(4, 16, kernels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.tanh())


def messages(kernels: tuple[int, ...], converters: dict) -> list[tuple[int, int]]:
    """(messages, rows sent) of this rank, forward and backward."""
    model = convert_to_domain_parallel(Embedded(kernels), parity.manager(), custom_converters=converters)
    x = shard_tensor(torch.randn(1, 4, 64, 8), -2, parity.manager()).requires_grad_()
    traffic = parity.manager().traffic
    counts = []
    traffic.reset()
    y = model(x)
    for step in (lambda: None, lambda: y.sum().backward()):
        step()
        counts.append((traffic.messages, traffic.bytes // (4 * 8 * 4)))
        traffic.reset()
    return counts


def test_the_kernels_of_an_embedding_share_one_exchange(worlds) -> None:
    kernels = (4, 8, 16, 32)
    halos = [(kernel - 4) // 2 for kernel in kernels]  # rows of a neighbour; the smallest kernel needs none
    apart = [(3, sum(halos))] * 2
    shared = [(1, max(halos))] * 2
    assert DOMAIN_CONVERTERS[CrossEmbedLayer] is SharedHalo
    assert worlds(2).run(messages, kernels, {}) == [apart] * 2
    assert worlds(2).run(messages, kernels, DOMAIN_CONVERTERS) == [shared] * 2


# Attention


def bias_gradient(tp: int) -> tuple[float, float]:
    """(error of the position bias's gradient, the largest share of it that one rank's heads have alone)."""
    mesh, _ = layout("none", tp, 1)
    torch.manual_seed(0)
    plain, cut = (WindowAttention(8, 4, 3, dynamic=True).double() for _ in range(2))
    cut.load_state_dict(plain.state_dict())
    conf = {"trainer": {"parallelism": {"data": "none", "tensor": tp, "domain": 1}}}
    cut = parallelize(cut, mesh, conf)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for model in (plain, cut):
        model(x).sin().sum().backward()
    wanted = plain.bias.network[-1].weight.grad
    own = wanted.view(tp, -1).norm(dim=1) / wanted.norm()  # of the last layer, a head's row is of that head alone
    return parity.relative(cut.bias.network[-1].weight.grad, wanted), float(own.max())


def test_the_gradient_of_a_position_bias_is_summed_over_the_heads_of_all_ranks(worlds) -> None:
    for error, own in worlds(2).run(bias_gradient, 2):
        assert error < TOLERANCE
        assert own < 0.99


def test_a_position_bias_is_a_function_of_the_offset() -> None:
    bias = DynamicPositionBias(4, 2, 3)
    points = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    for i, query in enumerate(points):
        for j, key in enumerate(points):
            torch.testing.assert_close(bias()[:, i, j], bias.network(query - key))


@pytest.mark.parametrize("dilated", [False, True])
def test_windows_hold_neighbours_or_points_far_apart(dilated: bool) -> None:
    """A point's output depends on the points of its window, and on no others."""
    attention = WindowAttention(4, 2, 3, dilated=dilated, dynamic=True).double()
    x = torch.randn(1, 4, 12, 6, dtype=torch.float64, requires_grad=True)
    attention(x)[0, :, 4, 1].sum().backward()
    rows, columns = ((0, 4, 8), (1, 3, 5)) if dilated else ((3, 4, 5), (0, 1, 2))
    found = x.grad[0].abs().sum(0).nonzero().tolist()
    assert found == [[row, column] for row in rows for column in columns]


# The model


def test_an_embedding_is_its_kernels_side_by_side() -> None:
    embed = CrossEmbedLayer(3, 20, (8, 2, 4), 2)
    assert [(conv.kernel_size[0], conv.out_channels) for conv in embed.convs] == [(2, 10), (4, 5), (8, 5)]
    x = torch.randn(1, 3, 6, 8)
    parts = [F.conv2d(x, c.weight, c.bias, 2, (c.kernel_size[0] - 2) // 2) for c in embed.convs]
    assert torch.equal(embed(x), torch.cat(parts, 1))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("strides", [(2, 2), (4, 1), (3, 2)])
def test_any_grid_and_it_starts_as_the_zero_map(decoder: str, strides: tuple[int, int]) -> None:
    kernels = [(stride, stride + 2) for stride in strides]
    for grid in ((19, 12), (36, 24), (25, 14)):
        torch.manual_seed(0)
        model = WXFormer(IN, OUT, grid, **{**SMALL, "strides": strides, "kernels": kernels, "decoder": decoder})
        y = model(torch.randn(1, IN, *grid))
        assert y.shape == (1, OUT, *grid)
        assert not y.any()


def test_a_grid_that_cannot_be_padded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 latitudes cannot be padded to 24, a multiple of 12 .* choose smaller"):
        WXFormer(IN, OUT, (4, 24), **{**SMALL, "padding": 10})
    with pytest.raises(ValueError, match="13 longitudes: no point lies opposite another across the pole"):
        WXFormer(IN, OUT, (19, 13), **SMALL)


def test_padding_before_and_after_differ() -> None:
    x = torch.arange(24.0).view(1, 1, 4, 6)
    assert torch.equal(pad_on_sphere(x, (1, 2), (3, 0)), pad_on_sphere(x, 2, 3)[..., 1:, :9])


# Spectral norm


def test_weights_have_a_largest_singular_value_of_one() -> None:
    for path, layer in build(19, spectral_norm=True).named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and "bias.network" not in path:
            for _ in range(50):
                weight = layer.weight.detach()
            outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            sigma = torch.linalg.matrix_norm(weight.movedim(outputs, 0).flatten(1), 2)
            assert path == "head" or sigma == pytest.approx(1, abs=0.02), path


def test_as_torch_does_it() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Conv2d(3, 4, 3).double(), nn.Conv2d(3, 4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    nn.utils.parametrizations.spectral_norm(theirs)
    normalize_weights(ours)
    mine, wanted = ours.parametrizations.weight[0], theirs.parametrizations.weight[0]
    mine.u, mine.v = wanted._u.clone(), wanted._v.clone()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for _ in range(3):
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert parity.relative(a.grad, b.grad) < 1e-12


def bfloat16(data: str) -> float:
    """Of a rank, how far the output in bfloat16 is from that in float32."""
    conf = {"trainer": {"amp": "bf16", "parallelism": {"data": data, "tensor": 1, "domain": 2}}}
    mesh, manager = layout("ddp", 1, 2)
    plain = build(19, spectral_norm=True).float()
    x = torch.randn(1, IN, 19, COLUMNS, generator=torch.Generator().manual_seed(0))
    model = parallelize(build(19, spectral_norm=True).float(), mesh, conf, manager, DOMAIN_CONVERTERS)
    with torch.autocast("cpu", torch.bfloat16, enabled=data == "ddp"):
        y = model(shard_tensor(x, -2, manager))
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    return parity.relative(gather_tensor(y.detach().float(), -2, manager), plain(x))


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
def test_bfloat16_is_near(worlds, data: str) -> None:
    assert all(error < 0.05 for error in worlds(2).run(bfloat16, data))


def test_the_norm_of_a_bfloat16_weight_is_found_in_full_precision() -> None:
    weight = torch.randn(4, 6)
    norm = SpectralNorm(weight, 0).eval()
    half = norm(weight.bfloat16())
    assert half.dtype == torch.bfloat16
    assert parity.relative(half.float(), norm(weight)) < 0.01
