"""The device mesh (dp, tp, domain), and who reads which samples. Its arithmetic is in `credit.layout`."""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from credit.config.parallelism import Conf
from credit.domain_parallel.torch_private import group_timeout
from credit.domain_parallel.warm import MEETING_S, warm
from credit.errors import LaunchError
from credit.layout import MeshShape, dp_world_size, joined_mesh_shape, mesh_coords, mesh_shape, parse_parallelism_conf
from credit.parallel.collectives import together
from credit.parallel.elsewhere import refused

__all__ = [
    "MeshShape",
    "build_device_mesh",
    "data_parallel_coords",
    "dp_world_size",
    "gradient_mesh",
    "mesh_coords",
    "mesh_shape",
    "parse_parallelism_conf",
]

logger = logging.getLogger(__name__)
__getattr__ = refused(__name__)


def build_device_mesh(
    parallelism_conf: dict[str, Any], device: str = "cuda", timeout: float = MEETING_S
) -> tuple[DeviceMesh | None, dict[str, DeviceMesh]]:
    """Build the mesh over all ranks.

    Args:
        parallelism_conf: as `parse_parallelism_conf` returns it.
        device: "cuda", or "cpu".
        timeout: seconds that the ranks of a group may take to meet on their devices.

    Returns:
        The mesh, with the dimensions among (dp, tp, domain) that are larger than 1, in that order, and the
        submesh of each; (None, {}) for one rank.

    Raises:
        ValueError: if the world does not divide, or holds several replicas that `data: none` would never join.
        CreditError: on every rank, if the ranks of a group do not meet; it names the group and the ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    shape = joined_mesh_shape(parallelism_conf, world_size)
    sizes = {name: size for name, size in shape._asdict().items() if size > 1}
    if not sizes:
        return None, {}
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    _meet(mesh, timeout)
    logger.info("mesh %s over %d ranks", " x ".join(f"{name} {size}" for name, size in sizes.items()), world_size)
    return mesh, {name: mesh[name] for name in sizes}


def gradient_axes(mesh: DeviceMesh | None) -> tuple[str, ...]:
    """The axes of a mesh along which ranks see different rows or samples."""
    return tuple(name for name in ("dp", "domain") if mesh is not None and name in (mesh.mesh_dim_names or ()))


def gradient_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The 1-D mesh of the ranks that see different rows or samples: dp x domain, flattened.

    Averaging over it makes every gradient the one of the global mean loss, if each rank's loss is its share of
    the mean times the number of these ranks.
    """
    names = gradient_axes(mesh)
    if mesh is None or not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("dp_domain")


def group_apart(mesh: DeviceMesh, names: tuple[str, ...]) -> dist.ProcessGroup:
    """A new group along axes of the mesh, for messages that may overtake others. Called by all ranks."""
    axes = [(mesh.mesh_dim_names or ()).index(name) for name in names]
    ranks = (
        mesh.mesh.movedim(axes, [*range(-len(axes), 0)])
        .flatten(-len(axes))
        .reshape(-1, prod(mesh.shape[axis] for axis in axes))
    )
    timeout = group_timeout(mesh.get_group(names[0]), mesh.device_type)
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    with together("meeting on the devices"):
        _refuse(warm("apart " + " ".join(names), group, mesh.device_type, timeout.total_seconds()))
    return group


def _meet(mesh: DeviceMesh, timeout: float) -> None:
    """Raise a CreditError on every rank unless all groups of the mesh have met."""
    assert dist.group.WORLD is not None
    groups = {name: mesh.get_group(name) for name in mesh.mesh_dim_names or ()}
    averaged = gradient_mesh(mesh)
    if averaged is not None and averaged.mesh_dim_names is not None:
        groups.setdefault(averaged.mesh_dim_names[0], averaged.get_group())
    _refuse(warm("world", dist.group.WORLD, mesh.device_type, timeout))  # in which they tell each other of the rest
    for name, group in groups.items():
        with together("meeting on the devices"):
            _refuse(warm(name, group, mesh.device_type, timeout))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise LaunchError(problem)


def data_parallel_coords(conf: Conf) -> tuple[int, int]:
    """(dp_rank, dp_size): which share of the samples this rank reads, and of how many.

    The sampler contract: samples are divided over dp only. Ranks that differ in their tp or domain coordinate
    work on one sample together (partial channels, or latitude slabs), so they must draw the same ones; build
    every sampler with `rank=dp_rank, num_replicas=dp_size`, never with the global rank.

    Args:
        conf: the whole config, see `parse_parallelism_conf`.

    Returns:
        (0, 1) while torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        return 0, 1
    shape = mesh_shape(parse_parallelism_conf(conf), dist.get_world_size())
    return mesh_coords(shape, dist.get_rank()).dp, shape.dp
