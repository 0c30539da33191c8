"""Who writes which latitudes of a forecast."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from credit.domain_parallel import DomainParallelManager, shard_tensor
from credit.layout import MeshShape
from credit.training.forecast import Chunk


def moved(latitudes: int) -> tuple[range, Tensor, int]:
    """This rank's chunk of a field of row numbers: (rows asked for, what came, bytes sent)."""
    manager = DomainParallelManager(dist.get_world_size(), dist.get_world_size())
    coords = MeshShape(0, 0, manager.domain_rank)
    job: Any = SimpleNamespace(shape=MeshShape(1, 1, manager.domain_world_size), coords=coords, manager=manager)
    chunk = Chunk(latitudes, job)
    slab = shard_tensor(torch.arange(float(latitudes))[:, None].expand(-1, 2), manager=manager)
    return chunk.rows, chunk.of(slab), manager.traffic.bytes


@pytest.mark.parametrize("latitudes", [4, 5, 6, 13, 31, 181])
def test_chunks_are_equally_high_and_made_by_moving_few_rows(worlds, latitudes) -> None:
    for ranks in (1, 3, 4):
        found = worlds(ranks).run(moved, latitudes)
        heights = [len(rows) for rows, _, _ in found]
        assert heights[: latitudes // heights[0]] == [heights[0]] * (latitudes // heights[0])
        assert sum(heights) == latitudes
        for rows, piece, sent in found:
            assert piece[:, 0].tolist() == list(rows)
            assert sent <= (ranks - 1) * 2 * 4
