"""Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.rules.axes import AxesOf, along, axes_of, axis_of
from credit.domain_parallel.rules.flip import roll
from credit.domain_parallel.slab import Slab, register_rule, rule, torch_functions


def _fourier_dims(several: bool, default: Any) -> AxesOf:
    def dims(x: Tensor, given: dict[str, Any]) -> Sequence[int]:
        dim, lengths = given.get("dim", default), given.get("s")
        if several and dim is None:
            lengths = (lengths,) if isinstance(lengths, int) else lengths
            dim = range(-len(lengths), 0) if lengths is not None else range(-x.ndim, 0)
        return axes_of(x, dim)

    return dims


for _kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _name, _default in ((_kind, -1), (f"{_kind}2", (-2, -1)), (f"{_kind}n", None)):
        _func = getattr(torch.fft, _name)
        register_rule(_func, along(_func, _fourier_dims(not _name.endswith("fft"), _default)))


def _shifted(func: Any) -> Any:
    def call(input: Slab, dim: Any = None) -> Any:
        dims = [
            axis_of(input, d) for d in (range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim)
        ]
        sign = 1 if func is torch.fft.fftshift else -1
        shifts = [input.shape[d] // 2 if sign > 0 else (input.shape[d] + 1) // 2 for d in dims]
        return roll(input, shifts, dims)

    return call


for _name in ("fft.fftshift", "fft.ifftshift"):
    rule(_name)(_shifted(torch_functions(_name)[0]))
