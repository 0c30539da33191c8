"""In which arithmetic a rank computes: what torch keeps as settings of the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from credit.config import Trainer

_determinism: Any = torch.utils.deterministic


@contextmanager
def computing_as(trainer: Trainer) -> Iterator[None]:
    """While it lasts, products of float32 are taken as `trainer.precision` says, and kernels as `deterministic` does.

    Torch's own default is neither: on a GPU it multiplies matrices as IEEE does and convolves in TF32.
    """
    # By the settings that torch.compile reads; it fails where their successors, `fp32_precision`, differ from them.
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = _determinism.fill_uninitialized_memory
    tf32 = trainer.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    _convolve_in_tf32(tf32)
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        _determinism.fill_uninitialized_memory = False  # only worth its time where somebody reads what nobody wrote
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        _convolve_in_tf32(convolutions)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        _determinism.fill_uninitialized_memory = fills


def _convolve_in_tf32(may: bool) -> None:
    """Also where flags may not be assigned, as after an import of torch's own tests."""
    torch.backends.cudnn.set_flags(_allow_tf32=may, _fp32_precision=None)


def in_words(trainer: Trainer) -> str:
    """What a run says of it."""
    how = {"ieee": "products as IEEE has them", "tf32": "products in TF32 on GPUs", "bf16": "products in bfloat16"}
    kernels = "deterministic kernels" if trainer.deterministic else "the fastest kernels"
    return f"{trainer.dtype}, {how[trainer.precision]}, {kernels}"
