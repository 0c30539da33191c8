"""What goes over the wire is what the operator needs: messages, bytes and collectives, counted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from credit.domain_parallel import SharedHalo, convert_to_domain_parallel, reshard_tensor, shard_tensor
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.torch_private import TorchDispatchMode
from credit.models.attention import WindowAttention
from tests.domain_parallel import parity
from tests.domain_parallel.operators import Call

ROW = 4 * 8 * 4  # channels x longitudes x bytes


def traffic(model: nn.Module | str, height: int, converters: dict | None = None) -> tuple[list[int], list[int]]:
    """[messages, bytes, collectives] of a forward and of a backward; the root's one collective not counted."""
    group = parity.manager()
    model = LOCAL[model]() if isinstance(model, str) else copy.deepcopy(model)
    model = convert_to_domain_parallel(model, group, custom_converters=converters)
    x = shard_tensor(torch.randn(1, 4, height, 8), -2, group).requires_grad_()
    counts = []
    group.traffic.reset()
    y = model(x)
    for step in ("forward", "backward"):
        if step == "backward":
            y.sum().backward()
        t = group.traffic
        counts.append([t.messages, t.bytes, t.collectives - (step == "forward")])
        t.reset()
    return counts[0], counts[1]


LOCAL = {
    "1x1 convolution": lambda: nn.Conv2d(4, 4, 1),
    "patches that fit": lambda: nn.Conv2d(4, 4, 4, stride=4),
    "activation": lambda: nn.GELU(),
    "channel norm": lambda: Call(lambda x: nn.functional.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1)),
    "softmax over channels": lambda: nn.Softmax(1),
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "upsampling by nearest": lambda: nn.Upsample(scale_factor=2),
    "transposed patches": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "fourier along longitude": lambda: Call(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2)),
    "aligned windows": lambda: WindowAttention(4, 2, 4),
    "pooling that fits": lambda: nn.MaxPool2d(2),
    "padding in longitude": lambda: nn.CircularPad2d((1, 1, 0, 0)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_operations_send_nothing(threads, name) -> None:
    assert threads(2).run(traffic, name, 32) == [([0, 0, 0], [0, 0, 0])] * 2


NORMS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm((17, 8)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_one_small_collective_each_way(threads, name) -> None:
    assert threads(3).run(traffic, NORMS[name](), 17) == [([0, 0, 1], [0, 0, 1])] * 3


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_padded_convolution_is_one_message_a_neighbour(threads, mode) -> None:
    north, middle, south = threads(3).run(traffic, nn.Conv2d(4, 4, 3, padding=(1, 0), padding_mode=mode), 17)
    edge = [2, 2 * ROW, 0] if mode == "circular" else [1, ROW, 0]
    assert middle == ([2, 2 * ROW, 0], [2, 2 * ROW, 0])
    assert north == (edge, edge)
    assert south == (edge, edge)


class CrossEmbed(nn.Module):
    """Parallel kernels at one stride."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 2, k, stride=2, padding=(k - 2) // 2) for k in (2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = CrossEmbed()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.tanh())


def shared_errors(height: int) -> dict[str, float]:
    torch.manual_seed(0)

    def convert(model: nn.Module, manager) -> nn.Module:
        return convert_to_domain_parallel(model, manager, custom_converters={CrossEmbed: SharedHalo})

    return parity.errors(Embedded(), (1, 4, height, 8), convert)


def test_layers_that_share_an_input_share_an_exchange(threads) -> None:
    apart = threads(2).run(traffic, Embedded(), 16)
    shared = threads(2).run(traffic, Embedded(), 16, {CrossEmbed: SharedHalo})
    assert apart[0] == ([2, (1 + 3) * ROW, 0], [2, (1 + 3) * ROW, 0])
    assert shared == [([1, 3 * ROW, 0], [1, 3 * ROW, 0])] * 2
    for height in (16, 17, 30):
        for errors in threads(3).run(shared_errors, height):
            assert max(errors.values()) < 1e-9


def transposed(shape: tuple[int, ...]) -> tuple[bool, bool, int]:
    group = parity.manager()
    whole = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    rows = shard_tensor(whole, -2, group).requires_grad_()
    group.traffic.reset()
    columns = reshard_tensor(rows, -2, -1, group)
    sent = group.traffic.bytes
    back = reshard_tensor(columns, -1, -2, group)
    (back * rows.detach()).sum().backward()
    return torch.equal(columns, shard_tensor(whole, -1, group)), torch.equal(rows.grad, rows), sent


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_transpose_sends_each_entry_that_changes_rank_once(threads, size) -> None:
    shape = (2, 3, 13, 9)
    found = threads(size).run(transposed, shape)
    assert all(right and inverse for right, inverse, _ in found)
    kept = sum(Partition(13, size).size(rank) * Partition(9, size).size(rank) for rank in range(size))
    assert sum(sent for _, _, sent in found) == 2 * 3 * (13 * 9 - kept) * 4


class Lifted(TorchDispatchMode):
    """Tensors that are made of numbers, each of which is a copy to the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def lifted() -> int:
    """In a step; those that are made once and kept are not seen."""
    up, down = nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.AvgPool2d(3, 2, 1)
    model = nn.Sequential(nn.GroupNorm(2, 4), up, down, nn.InstanceNorm2d(4))
    model = convert_to_domain_parallel(model, parity.manager())
    x = shard_tensor(torch.randn(1, 4, 19, 8), -2, parity.manager()).requires_grad_()
    with Lifted() as mode:
        model(x).sum().backward()
    return mode.count


def test_numbers_that_follow_from_shapes_are_not_copied_to_the_device_in_every_step(threads) -> None:
    """But for the ranks' agreement at the start of a forward."""
    assert threads(3).run(lifted) == [1, 1, 1]
