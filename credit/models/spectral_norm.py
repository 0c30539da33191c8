"""Weights divided by their largest singular value."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_START_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """weight / sigma, its largest singular value as a matrix (output channels, all else) (Miyato et al. 2018).

    Each use in training brings `u` and `v` one step of power iteration nearer to the singular vectors. As torch's
    `parametrizations.spectral_norm`, but sigma is found in the precision of the stored weight, so that it works in
    bfloat16 (autocast, and FSDP2, which hands over weights that are cast).

    Args:
        weight: to start from.
        outputs: its axis of output channels.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        matrix = self._matrix(weight.detach())
        for name, size in zip("uv", matrix.shape, strict=True):
            self.register_buffer(name, F.normalize(torch.randn(size, dtype=weight.dtype, device=weight.device), dim=0))
        self._iterate(matrix, _START_ITERATIONS)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.outputs, 0).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, times: int = 1) -> None:
        for _ in range(0 if matrix.is_meta else times):  # without values there is nothing to find
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))
            self.v.copy_(F.normalize(self.u @ matrix, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight).to(self.u.dtype)
            if self.training:
                self._iterate(matrix)
            # Copies: the next use changes u and v, and this one's backward comes after it.
            sigma = self.u.clone() @ (matrix @ self.v.clone())
            return weight / sigma.to(weight.dtype)


def normalize_weights(module: nn.Module, but: tuple[type[nn.Module], ...] = ()) -> None:
    """Give every convolution and linear layer in `module` a `SpectralNorm`, outside of modules of the types `but`.

    Their weights must not be zero.
    """
    for child in module.children():
        if not isinstance(child, but):
            normalize_weights(child, but)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        outputs = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight, outputs))
