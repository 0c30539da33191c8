"""One arithmetic: coords, DeviceMesh and DomainParallelManager agree for every (dp, tp, domain)."""

from __future__ import annotations

import itertools

import pytest
import torch.distributed as dist

from credit.domain_parallel import DomainParallelManager
from credit.parallel.mesh import (
    build_device_mesh,
    data_parallel_coords,
    dp_world_size,
    mesh_coords,
    mesh_shape,
    parse_parallelism_conf,
)

SHAPES = [
    shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if shape[0] * shape[1] * shape[2] in (1, 2, 4, 8)
]


def facts(dp: int, tp: int, domain: int) -> dict:
    conf = {"trainer": {"parallelism": {"data": "ddp", "tensor": tp, "domain": domain}}}
    parsed = parse_parallelism_conf(conf)
    mesh, submeshes = build_device_mesh(parsed, device="cpu")
    manager = DomainParallelManager.from_mesh(mesh)
    names = mesh.mesh_dim_names if mesh is not None else ()
    found = {
        "coords": data_parallel_coords(conf),
        "arithmetic": mesh_coords(mesh_shape(parsed, dist.get_world_size()), dist.get_rank()),
        "mesh": tuple(mesh.get_local_rank(name) if name in names else 0 for name in ("dp", "tp", "domain")),
        "names": names,
        "submeshes": {name: sub.size() for name, sub in submeshes.items()},
        "manager": (manager.dp_rank, manager.dp_world_size, manager.domain_rank, manager.domain_world_size),
        "domain peers": dist.get_process_group_ranks(manager.domain_group) if manager.domain_group else None,
        "neighbours": manager.neighbor_ranks(),
    }
    return found


@pytest.mark.parametrize(("dp", "tp", "domain"), SHAPES)
def test_mesh_coords_and_manager_agree(worlds, dp: int, tp: int, domain: int) -> None:
    for rank, found in enumerate(worlds(dp * tp * domain).run(facts, dp, tp, domain)):
        expected = (rank // (tp * domain), rank // domain % tp, rank % domain)
        assert found["coords"] == (expected[0], dp)
        assert tuple(found["arithmetic"]) == found["mesh"] == expected
        sizes = {name: size for name, size in zip(("dp", "tp", "domain"), (dp, tp, domain), strict=True) if size > 1}
        assert found["names"] == tuple(sizes)
        assert found["submeshes"] == sizes
        assert found["manager"] == (expected[0], dp, expected[2], domain)
        first = rank - expected[2]
        assert found["domain peers"] == (list(range(first, first + domain)) if domain > 1 else None)
        assert found["neighbours"] == (
            rank - 1 if expected[2] > 0 else None,
            rank + 1 if expected[2] < domain - 1 else None,
        )


def test_one_process_without_torch_distributed_is_one_replica() -> None:
    assert data_parallel_coords({"trainer": {"parallelism": {"domain": 4}}}) == (0, 1)


def test_a_world_that_does_not_divide_names_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match=r"6 ranks do not divide .* tensor 2 x domain 2 = 4 ranks: start 4 or 8 ranks"):
        dp_world_size({"data": "ddp", "tensor": 2, "domain": 2}, 6)


def replicas_without_sync() -> None:
    with pytest.raises(ValueError, match="2 replicas, which data: none would train apart"):
        build_device_mesh(parse_parallelism_conf({}), device="cpu")


def test_replicas_that_nothing_joins_are_refused(worlds) -> None:
    worlds(2).run(replicas_without_sync)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"domian": 2}, "did you mean 'domain'"),
        ({"data": "zero3"}, "trainer.parallelism.data: input should be 'fsdp2', 'ddp' or 'none', got 'zero3'"),
        ({"tensor": 0}, "trainer.parallelism.tensor: input should be greater than or equal to 1, got 0"),
        ({"domain": 2.0}, "trainer.parallelism.domain: input should be a valid integer"),
        ({"domain": True}, "trainer.parallelism.domain: input should be a valid integer"),
    ],
)
def test_a_bad_block_is_refused_by_its_dotted_name(block: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_parallelism_conf({"trainer": {"parallelism": block}})
