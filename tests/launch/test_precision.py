"""What a config says of arithmetic is what torch is told, and afterwards all is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from credit.config import Trainer
from credit.config.parallelism import Sharding
from credit.launch.precision import computing_as, in_words


def settings() -> tuple[Any, ...]:
    strict = torch.are_deterministic_algorithms_enabled()
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, strict


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        ({}, ("highest", False, False), "float32, products as IEEE has them, the fastest kernels"),
        ({"precision": "tf32"}, ("high", True, False), "float32, products in TF32 on GPUs, the fastest kernels"),
        ({"precision": "bf16"}, ("highest", False, False), "float32, products in bfloat16, the fastest kernels"),
        (
            {"deterministic": True},
            ("highest", False, True),
            "float32, products as IEEE has them, deterministic",
        ),
    ],
)
def test_settings_last_as_long_as_the_job(given, wanted, said, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)  # as torch's own tests have it
    before, trainer = settings(), Trainer(epochs=1, batch_size=1, **given)
    with computing_as(trainer):
        assert settings() == wanted
    assert settings() == before
    assert in_words(trainer).startswith(said)


@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        ({}, "ieee"),
        ({"amp": True}, "bf16"),
        ({"amp": "bf16"}, "bf16"),
        ({"amp": False}, "ieee"),
        ({"amp": None}, "ieee"),
        ({"precision": "tf32"}, "tf32"),
    ],
)
def test_a_whole_config_of_others_may_say_amp(trainer, wanted) -> None:
    assert Sharding.of({"trainer": trainer}).precision == wanted


def test_another_kind_of_amp_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"trainer.precision: input should be 'ieee', 'tf32' or 'bf16', got 'fp16'"):
        Sharding.of({"trainer": {"amp": "fp16"}})


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_float64_has_no_products_to_round(precision) -> None:
    """Plain ranks would round nothing, and FSDP2 parameters but not biases."""
    with pytest.raises(ValueError, match=f"precision: {precision} is of products of float32.*leave one out"):
        Trainer(epochs=1, batch_size=1, precision=precision, dtype="float64")
