from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import World

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """worlds(n): a world of n gloo ranks, kept alive for the session."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started or not started[size].alive:
            started[size] = World(size)
        return started[size]

    yield world
    for one in started.values():
        one.close()
