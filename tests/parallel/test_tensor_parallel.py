"""Tensor parallelism: cut == whole (output, gradients of input and parameters, in float64), or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

from credit.checks.parity import place_in
from credit.domain_parallel import DomainParallelError, DomainParallelManager, convert_to_domain_parallel, shard_tensor
from credit.domain_parallel.thread_ranks import RankError as ThreadRankError
from credit.domain_parallel.thread_ranks import ThreadWorld, thread_ranks
from credit.models.attention import AxialAttention, GlobalAttention, WindowAttention
from credit.models.transformer import ConvMLP, WindowTransformer
from credit.parallel.collectives import local
from credit.parallel.tensor_parallel import TensorParallelError, apply_tensor_parallel
from tests.domain_parallel.parity import check, relative
from tests.ranks import RankError

C, H, W = 8, 13, 8


class Pair(nn.Module):
    """Two linear layers over channels last, and what stands between them."""

    _tp_col = "first"
    _tp_row = "second"

    def __init__(self, between=F.gelu, width: int = 12, norm: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(C, width, bias=bias)
        self.norm = norm
        self.second = nn.Linear(width, C, bias=bias)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x.movedim(1, -1)))
        if self.norm is not None:
            y = self.norm(y.movedim(-1, 1)).movedim(1, -1)
        return x + self.second(y).movedim(-1, 1)


class Gated(Pair):
    _tp_fused = 2

    def __init__(self) -> None:
        super().__init__(width=16)
        self.second = nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.first(x.movedim(1, -1)).chunk(2, -1)
        return self.second(F.silu(gate) * value).movedim(-1, 1)


class Separate(nn.Module):
    """Queries, keys and values of layers of their own, a learnt position bias and a temperature."""

    _tp_col = ("q", "k", "v.0")
    _tp_row = "out.1"

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C, bias=False), nn.Sequential(nn.Linear(C, C))
        self.out = nn.Sequential(nn.Identity(), nn.Linear(C, C))
        self.position = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, heads, bias=False))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(0, 1)
        q, k, v = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.position(torch.linspace(-1, 1, W, dtype=x.dtype).unsqueeze(-1)).t()[None, :, None, :]
        weights = (q @ k.transpose(-1, -2) * self.temperature + bias).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).flatten(-2))
        return y.unflatten(0, (x.shape[0], -1)).permute(0, 3, 1, 2)


def spectral() -> nn.Module:
    pair = ConvMLP(C, 2)
    parametrizations.spectral_norm(pair.expand)
    parametrizations.weight_norm(pair.project)
    nn.utils.spectral_norm(pair.mix)
    return pair


def old_spectral() -> nn.Module:
    pair = Pair()
    nn.utils.spectral_norm(pair.first)
    nn.utils.weight_norm(pair.second)
    return pair


def tied() -> nn.Module:
    """The second layer's weight is the first's, transposed before: here simply shared by two blocks."""
    first, second = Pair(), Pair()
    second.first.weight = first.first.weight
    return nn.Sequential(first, second)


def twice() -> nn.Module:
    block = Pair()
    return nn.Sequential(block, nn.Tanh(), block)


MODELS = {
    "pair": Pair,
    "no bias": lambda: Pair(bias=False),
    "group norm": lambda: Pair(norm=nn.GroupNorm(4, 12)),
    "depthwise": lambda: Pair(norm=nn.Conv2d(12, 12, 3, padding=1, groups=12)),
    "dropout": lambda: Pair(between=nn.Dropout(0.4)),
    "gated": Gated,
    "separate": Separate,
    "mlp": lambda: ConvMLP(C, 2),
    "sequence": lambda: nn.Sequential(ConvMLP(C, 2), nn.Conv2d(C, C, 3, padding=1), Pair(), WindowAttention(C, 4, 4)),
    "windows": lambda: WindowAttention(C, 4, 4, shift=2),
    "long windows": lambda: WindowAttention(C, 4, 4, dilated=True),
    "axial": lambda: nn.Sequential(AxialAttention(C, 4, -1), AxialAttention(C, 4, -2)),
    "global": lambda: GlobalAttention(C, 4),
    "spectral norm": spectral,
    "old spectral norm": old_spectral,
    "tied": tied,
    "twice": twice,
    "transformer": lambda: WindowTransformer(C, C, (H, W), width=16, depth=2, heads=4, window=2),
}


@cache
def mesh(tp: int, domain: int) -> DeviceMesh:
    return init_device_mesh(
        "cpu", (dist.get_world_size() // tp // domain, tp, domain), mesh_dim_names=("dp", "tp", "domain")
    )


@cache
def manager(tp: int, domain: int) -> DomainParallelManager:
    return DomainParallelManager.from_mesh(mesh(tp, domain))


def errors(name: str, cut: Callable[[nn.Module], nn.Module], manager: DomainParallelManager) -> dict[str, float]:
    """Relative errors on this rank of a model that is cut by `cut` and over the manager's domain. Runs on ranks."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(MODELS[name]().double())
        for i, parameter in enumerate(models[-1].parameters()):
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    plain, ours = models[0], convert_to_domain_parallel(cut(models[1]), manager)
    x = torch.randn(2, C, H, W, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = plain(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)

    def rows(t):
        return shard_tensor(t, -2, manager)

    mine = rows(x.detach()).clone().requires_grad_()
    torch.manual_seed(1)
    output = ours(mine)
    output.backward(rows(cotangent))
    found = {"output": relative(output, rows(y)), "input": relative(mine.grad, rows(x.grad))}
    owners = {p: (module, n) for module in ours.modules() for n, p in module._parameters.items()}
    for (path, wanted), (path_too, parameter) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert path == path_too
        total = manager.group.all_reduce(local(parameter.grad))
        layer, n = owners[parameter]
        found[path] = relative(layer.whole(total) if n in getattr(layer, "_tp_cut", ()) else total, wanted.grad)
    return found


def errors_of_processes(name: str, tp: int, domain: int) -> dict[str, float]:
    def cut(model: nn.Module) -> nn.Module:
        return apply_tensor_parallel(model, mesh(tp, domain)["tp"] if tp > 1 else None)

    return errors(name, cut, manager(tp, domain))


@pytest.mark.parametrize(("tp", "domain"), [(2, 1), (4, 1), (2, 2), (1, 2), (1, 4), (2, 4), (4, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_cut_equals_whole(name: str, tp: int, domain: int) -> None:
    with thread_ranks(tp * domain) as world:

        def on_rank() -> dict[str, float]:
            place = place_in(world, tp, domain)
            return errors(name, place.cut.apply if place.cut else lambda model: model, place.manager)

        check(world.run(on_rank))


@pytest.mark.parametrize("name", MODELS)
def test_cut_equals_whole_on_processes_whose_parameters_are_dtensors(worlds, name: str) -> None:
    check(worlds(4).run(errors_of_processes, name, 2, 2))


def parameters(name: str) -> list[tuple[str, tuple, tuple]]:
    model = apply_tensor_parallel(MODELS[name](), mesh(2, 1)["tp"])
    return [
        (path, tuple(p.shape), tuple(p.to_local().shape))
        for path, p in model.named_parameters()
        if isinstance(p, DTensor)
    ]


def test_parameters_are_dtensors_under_the_plain_names(worlds) -> None:
    for found in worlds(2).run(parameters, "windows"):
        assert found == [
            ("qkv.weight", (24, 8), (12, 8)),
            ("qkv.bias", (24,), (12,)),
            ("project.weight", (8, 8), (8, 4)),
        ]
    for found in worlds(2).run(parameters, "spectral norm"):
        assert [path for path, *_ in found] == ["expand.bias"]


class Leaks(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.movedim(1, -1))


class Unfused(Gated):
    _tp_fused = 1


class TwoHeads(Separate):
    def __init__(self) -> None:
        super().__init__(heads=2)


class Uncut(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(x.movedim(1, -1).repeat(1, 1, 1, 2)[..., :12]).movedim(-1, 1)


class Twice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x.movedim(1, -1))))


REFUSED_AT_RUN = {
    "softmax over channels": (lambda: Pair(between=lambda y: y.softmax(-1)), r"Pair: torch.Tensor.softmax cannot be"),
    "layer norm over channels": (
        lambda: Pair(between=lambda y: F.layer_norm(y, (12,))),
        r"Pair: torch\..*norm cannot be",
    ),
    "mean over channels": (
        lambda: Pair(between=lambda y: y - y.mean(-1, keepdim=True)),
        r"mean cannot .* move channels",
    ),
    "odd groups": (
        lambda: Pair(norm=nn.GroupNorm(3, 12)),
        r"norm \(.*GroupNorm\): .*group_norm .*groups do not divide",
    ),
    "batch norm": (
        lambda: Pair(norm=nn.BatchNorm2d(12)),
        r"norm \(BatchNorm2d\): .*batch_norm .*whose channels are cut",
    ),
    "full convolution": (lambda: Pair(norm=nn.Conv2d(12, 12, 3, padding=1)), r"norm \(.*Conv2d\): .*conv2d cannot"),
    "a layer in between": (lambda: Pair(norm=nn.Conv2d(12, 12, 1)), r"norm \(Conv2d\): .*conv2d cannot"),
    "roll of channels": (lambda: Pair(between=lambda y: y.roll(1, -1)), r"Tensor.roll cannot .* move channels"),
    "half of the channels": (lambda: Pair(between=lambda y: y[..., :6].repeat(1, 1, 1, 2)), "getitem.* move channels"),
    "heads that do not divide": (TwoHeads, "Tensor.unflatten cannot .* move channels"),
    "fused, not declared": (Unfused, "Tensor.chunk cannot .* move channels"),
    "no channels cut": (Uncut, r"second \(Linear\): the row layer cannot be done"),
    "two columns": (lambda: Twice(width=C), r"first \(Linear\): a column layer cannot be done"),
    "leaks": (Leaks, "gives channels that are still cut over|leaving the model cannot be done on channels cut"),
}


def run_refused(world: ThreadWorld, name: str, tp: int, domain: int) -> None:
    torch.manual_seed(0)
    place = place_in(world, tp, domain)
    model = convert_to_domain_parallel(place.cut.apply(REFUSED_AT_RUN[name][0]()), place.manager)
    model(shard_tensor(torch.randn(2, C, H, W), -2, place.manager)).sum().backward()


@pytest.mark.parametrize(("tp", "domain"), [(4, 1), (4, 2)])
@pytest.mark.parametrize("name", REFUSED_AT_RUN)
def test_what_needs_other_channels_is_refused_on_every_rank(name: str, tp: int, domain: int) -> None:
    with thread_ranks(tp * domain) as world, pytest.raises(ThreadRankError) as caught:
        world.run(run_refused, world, name, tp, domain)
    assert len(caught.value.errors) == tp * domain
    for error in caught.value.errors.values():
        assert isinstance(error, DomainParallelError | TensorParallelError), error
        assert re.search(REFUSED_AT_RUN[name][1], str(error)), error
        assert "tensor: 1" in str(error) or "output must come from 'second'" in str(error)


def declaring(**attributes) -> type[Pair]:
    return type("Declared", (Pair,), attributes)


def changed(name: str, layer: nn.Module) -> nn.Module:
    pair = Pair()
    setattr(pair, name, layer)
    return pair


REFUSED_AT_ONCE = {
    "no block": (lambda: nn.Linear(3, 3), r"Linear has no block that declares _tp_col and _tp_row.*use tensor: 1"),
    "half a pair": (lambda: declaring(_tp_row=None)(), r"declares one of _tp_col and _tp_row, not both"),
    "no such path": (lambda: declaring(_tp_col="third")(), r"declares 'third', and third does not exist"),
    "wrong layer": (lambda: changed("first", nn.LayerNorm(4)), r"first is a LayerNorm: only nn.Linear and 1x1"),
    "wide kernel": (lambda: changed("second", nn.Conv2d(12, 8, 3)), r"second is a convolution of kernel \(3, 3\)"),
    "width": (lambda: Pair(width=10), r"first: 10 output channels do not divide over 4 tensor-parallel ranks"),
    "fused width": (lambda: declaring(_tp_fused=5)(), r"first: 12 output channels \(5 fused tensors\) do not divide"),
    "both": (lambda: declaring(_tp_col=("first", "second"))(), r"second is declared both as a column and as a row"),
}


def apply_refused(name: str) -> None:
    apply_tensor_parallel(REFUSED_AT_ONCE[name][0](), mesh(4, 1)["tp"])


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_a_wrong_declaration_is_refused_before_anything_is_changed(worlds, name: str) -> None:
    with pytest.raises(RankError, match=REFUSED_AT_ONCE[name][1]) as caught:
        worlds(4).run(apply_refused, name)
    assert len(caught.value.errors) == 4


def test_one_rank_leaves_the_model_as_it_is() -> None:
    model = Pair()
    assert apply_tensor_parallel(model, None) is model
    assert type(model.first) is nn.Linear
