"""Conversion changes what a module does and nothing else about it; what it cannot do it refuses by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from credit.domain_parallel import (
    DomainParallelConv2d,
    DomainParallelError,
    convert_to_domain_parallel,
    shard_tensor,
    validate_sharding_constraints,
)
from credit.domain_parallel.layers import DomainParallelLayer
from credit.domain_parallel.thread_ranks import RankError
from credit.models.attention import WindowAttention
from tests.domain_parallel import parity
from tests.domain_parallel.parity import check


class Shared(nn.Module):
    """One convolution used at two scales, under two names, between norms and an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.down = nn.Conv2d(3, 3, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.up = nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1, output_padding=1)
        self.resize = nn.Upsample(size=(17, 8), mode="bilinear")
        self.project = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(self.norm(self.down(self.first(x))))
        return self.project(self.up(y)[..., :8] + self.resize(y) + x)


def whole_model_errors(wrap: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = Shared()
    if wrap == "spectral_norm":
        model.first = model.again = spectral_norm(model.first)
    if wrap == "weight_norm parametrization":
        parametrizations.weight_norm(model.down)
        parametrizations.spectral_norm(model.up)
    if wrap == "hook":
        model.down.register_forward_hook(lambda module, args, output: 2 * output)
    if wrap == "eval":
        model.eval()
    return parity.errors(model, (2, 3, 17, 8))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", ["plain", "spectral_norm", "weight_norm parametrization", "hook", "eval"])
def test_a_whole_model_is_exact(threads, size, wrap) -> None:
    check(threads(size).run(whole_model_errors, wrap))


def identity_facts() -> dict[str, bool]:
    model = Shared()
    names, modules = list(model.state_dict()), dict(model.named_modules())
    before = {name: type(module) for name, module in modules.items()}
    converted = convert_to_domain_parallel(model, parity.manager())
    again = convert_to_domain_parallel(converted, parity.manager())
    clone = copy.deepcopy(converted)
    loaded = pickle.loads(pickle.dumps(converted))
    x = shard_tensor(torch.randn(1, 3, 17, 8), -2, parity.manager())
    return {
        "same object": converted is model and again is model,
        "no hooks added": not model._forward_pre_hooks and not model._forward_hooks,
        "same names": list(converted.state_dict()) == names,
        "same modules": all(dict(model.named_modules())[name] is module for name, module in modules.items()),
        "shared stays shared": model.first is model.again and clone.first is clone.again,
        "still a Conv2d": isinstance(model.first, nn.Conv2d) and isinstance(model.first, DomainParallelConv2d),
        "1x1 untouched": type(model.project) is before["project"],
        "conv is the plain view": type(model.first.conv) is nn.Conv2d and model.first.conv.weight is model.first.weight,
        "plain checkpoint loads": not model.load_state_dict(Shared().state_dict()).missing_keys,
        "deep copy computes": torch.equal(clone.load_state_dict(model.state_dict()) and clone(x), model(x)),
        "pickle computes": torch.equal(loaded.load_state_dict(model.state_dict()) and loaded(x), model(x)),
    }


def test_conversion_keeps_names_modules_and_identity(threads) -> None:
    for facts in threads(2).run(identity_facts):
        assert all(facts.values()), facts


def root_facts() -> tuple[bool, dict[str, float]]:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    root = convert_to_domain_parallel(conv, parity.manager())
    return isinstance(root, DomainParallelLayer), parity.errors(nn.Conv2d(2, 2, 3, padding=1), (1, 2, 9, 4))


def test_the_root_itself_is_converted(threads) -> None:
    found = threads(2).run(root_facts)
    assert all(converted for converted, _ in found)
    check([errors for _, errors in found])


def test_one_domain_rank_or_no_manager_is_the_plain_model() -> None:
    model = Shared()
    assert convert_to_domain_parallel(model, None) is model
    assert not any(isinstance(module, DomainParallelLayer) for module in model.modules())


def settling_messages() -> list[int]:
    model = convert_to_domain_parallel(Shared(), parity.manager())
    counts = []
    for height in (17, 17, 17):
        parity.manager().traffic.reset()
        with torch.no_grad():
            model(shard_tensor(torch.randn(1, 3, height, 8), -2, parity.manager()))
        counts.append(parity.manager().traffic.collectives)
    return counts


def test_lengths_are_asked_for_once(threads) -> None:
    # The root at each forward, and the statistics of one norm.
    assert threads(2).run(settling_messages) == [[2, 2, 2]] * 2


def forward_of(heights: list[int], widths: list[int]) -> None:
    model = convert_to_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), parity.manager())
    rank = parity.manager().domain_rank
    model(torch.zeros(1, 1, heights[rank], widths[rank]))


@pytest.mark.parametrize(
    ("heights", "widths", "message"),
    [
        ([8, 9], [4, 4], r"hold \[8, 9\] rows, but 17 rows over 2 ranks are \[9, 8\]"),
        ([9, 8], [4, 5], "were given different inputs"),
        ([1, 0], [4, 4], "1 rows over 2 ranks; each needs at least one"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_on_every_rank(threads, heights, widths, message) -> None:
    with pytest.raises(RankError, match=message) as caught:
        threads(2).run(forward_of, heights, widths)
    assert {type(error) for error in caught.value.errors.values()} == {DomainParallelError}
    assert len(caught.value.errors) == 2


def test_windows_that_do_not_fit_a_shard_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 2, stride=2))
    assert validate_sharding_constraints(model, 160, [10, 5]) == []
    (warning,) = validate_sharding_constraints(model, 160, [10, 3])
    assert warning == "level 1: 20 local rows do not divide into windows of 3 rows"
    (warning,) = validate_sharding_constraints(model, 180, [5, 3])
    assert "level 1: 180 local rows do not divide by the encoder's stride of 8" in warning


def test_strides_and_windows_are_found_in_the_model_and_heights_may_differ() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), WindowAttention(8, 2, 5), WindowAttention(8, 2, 10))
    model = nn.Sequential(stage, nn.Conv2d(8, 8, 2, stride=2), WindowAttention(8, 2, 5, dilated=True))
    assert validate_sharding_constraints(model, 40 * 4) == []
    assert validate_sharding_constraints(model, [240, 160]) == []
    assert validate_sharding_constraints(model, [184, 176]) == [
        "level 0: 45 local rows do not divide into windows of 10 rows",
        "level 1: 22 and 23 local rows do not divide into windows of 5 rows",
    ]
    assert validate_sharding_constraints(model, [181, 180]) == [
        "level 0: 181 local rows do not divide by the encoder's stride of 4",
        "level 1: 180 and 181 local rows do not divide by the encoder's stride of 8",
    ]
