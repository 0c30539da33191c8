"""Random generators of a process: where they stand, and how torch's are seeded."""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import numpy as np
import torch

GENERATORS = ("torch", "Python", "numpy")


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the CPU and of the accelerator, if there is one.

    `torch.manual_seed` does so too, and writes down the stack of its caller for every kind of device that is not in
    use, in case it will be: a tenth of a millisecond and more, which draws of each sample would pay each time.
    """
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        torch.get_device_module(accelerator).manual_seed_all(seed)


def torch_generator_state() -> tuple[int, ...]:
    """Where torch's random generators stand: the CPU's, and the current accelerator's."""
    ours: tuple[int, ...] = (digest(torch.get_rng_state().numpy().tobytes()),)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        ours += (generator.initial_seed(), generator.get_offset())
    return ours


def generator_states() -> tuple[Any, ...]:
    """Where the random generators stand, as in GENERATORS."""
    _, words, after = random.getstate()
    state = np.random.get_state(legacy=False)["state"]
    return (
        torch_generator_state(),
        (hash(words), after),
        (state["pos"], digest(state["key"].tobytes())),
    )


def digest(data: bytes) -> int:
    """Of 64 bits, signed, as a tensor of integers holds it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


class Generators:
    """Where random generators stand: torch's, Python's, and numpy's where there is numpy."""

    def __init__(self) -> None:
        self.numpy: Any = _numpy_random().get_bit_generator() if "numpy" in sys.modules else None
        self.save()

    def save(self) -> None:
        """Of the process, as they stand now. Numpy draws from this very object."""
        self.torch, self.python = torch.default_generator.get_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.default_generator.set_state(self.torch)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.numpy is not None:
            _numpy_random().set_bit_generator(self.numpy)

    def stand_where(self, other: Generators) -> None:
        """Take over where `other` stands, with an object of its own for numpy to draw from."""
        self.torch, self.python, self.cuda = other.torch, other.python, other.cuda
        if other.numpy is None:
            self.numpy = None
            return
        if type(self.numpy) is not type(other.numpy) or self.numpy is other.numpy:
            self.numpy = type(other.numpy)()
        self.numpy.state = other.numpy.state


def _numpy_random() -> Any:
    return sys.modules["numpy"].random
