"""Activations that are computed again: the same gradients and buffers, though a forward changes buffers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from credit.parallel.fsdp2 import recompute_activations


def block() -> nn.Module:
    convs = [nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(2)]
    return nn.Sequential(convs[0], nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.3), convs[1])


def after_two_steps_at_once(model: nn.Module) -> dict[str, Tensor]:
    """Gradients through two forwards, one on the other's output, and buffers."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.autograd.backward(model(x + model(x)).square().sum())
    return {
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **{f"buffer {name}": buffer for name, buffer in model.named_buffers()},
    }


def test_what_is_computed_again_is_what_was_computed() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(block(), nn.Tanh(), block()).double()
    again = copy.deepcopy(plain)
    recompute_activations([again[0], again[2]])
    wanted, found = after_two_steps_at_once(plain), after_two_steps_at_once(again)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)
