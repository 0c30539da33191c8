"""Groups whose communicators are made at their first call, as NCCL's are, meet before an exchange of rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from credit.domain_parallel import DomainParallelManager
from credit.domain_parallel.groups import ProcessRanks
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Window, make_plan
from credit.domain_parallel.warm import warm
from credit.errors import CreditError
from credit.parallel.mesh import build_device_mesh
from tests.lazily import Lazily
from tests.ranks import RankError, World


@pytest.fixture(scope="module")
def lazy() -> Iterator[World]:
    world = World(4, "lazily")
    yield world
    world.close()


def padded(group: dist.ProcessGroup | None) -> list[float]:
    """721 rows over 4 ranks, padded to 724: rank 0 has what it needs, the others are sent a few."""
    assert group is not None
    ranks, before, after = ProcessRanks(group), Partition(721, 4), Partition(724, 4)
    rows = before.range(ranks.rank)
    plan = make_plan(Window(after=3), before, ranks.rank, after)
    return exchange(torch.arange(rows.start, rows.stop).double()[:, None], plan, 0, ranks)[:, 0].tolist()


def cool() -> None:
    assert isinstance(dist.group.WORLD, Lazily)
    dist.group.WORLD.cool()  # of which a mesh of one axis makes use


def of_a_cold_mesh() -> list[float]:
    return padded(init_device_mesh("cpu", (4,), mesh_dim_names=("domain",)).get_group())


def of_our_mesh() -> list[float]:
    return padded(build_device_mesh({"data": "none", "tensor": 1, "domain": 4}, "cpu")[1]["domain"].get_group())


def of_a_manager() -> list[float]:
    return padded(DomainParallelManager(4, 4).domain_group)


def test_an_exchange_in_which_a_rank_takes_no_part_is_no_first_call(lazy) -> None:
    with pytest.raises(RankError, match="not all ranks of the group made its first call") as caught:
        lazy.run(of_a_cold_mesh)
    assert sorted(caught.value.errors) == [1, 2, 3]
    for meet in (of_our_mesh, of_a_manager):
        lazy.run(cool)
        assert [row for rows in lazy.run(meet) for row in rows] == [*range(721), 0, 0, 0]


def with_an_unplugged_device(patience_s: float, timeout: float) -> float:
    """Seconds until a mesh is refused, in which rank 3's device reaches no other one; world and groups are new."""
    begin = time.monotonic()
    with (
        patch.object(Lazily, "unplugged", dist.get_rank() == 3),
        patch.object(Lazily, "patience_s", patience_s),
        pytest.raises(
            CreditError,
            match=r"a dp group did not meet on their devices \(cpu\): of its ranks 1 \(.*\), 3 \(.*\) came, which",
        ),
    ):
        build_device_mesh({"data": "ddp", "tensor": 2, "domain": 1}, "cpu", timeout)
    return time.monotonic() - begin


@pytest.mark.parametrize(("patience_s", "timeout"), [(1.0, 60.0), (60.0, 1.0)], ids=["that raises", "that hangs"])
def test_a_device_that_no_other_one_reaches_is_named_to_all_ranks(lazy, patience_s: float, timeout: float) -> None:
    assert max(lazy.run(with_an_unplugged_device, patience_s, timeout)) < 30


def without_rank(absent: int) -> str | None:
    return None if dist.get_rank() == absent else warm("world", dist.group.WORLD, "cpu", 1.0)  # type: ignore[arg-type]


def test_a_rank_that_does_not_come_is_named() -> None:
    world = World(3, "lazily")
    try:
        for rank, said in enumerate(world.run(without_rank, 1)):
            assert (said is None) == (rank == 1)
            assert said is None or ("came, and 1 did not; nothing came in 1 s" in said)
    finally:
        world.close()
