"""The device mesh (dp, tp, domain), and who reads which samples. Its arithmetic is in `credit.layout`."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from credit.config.parallelism import Conf
from credit.layout import MeshShape, dp_world_size, joined_mesh_shape, mesh_coords, mesh_shape, parse_parallelism_conf
from credit.parallel.elsewhere import refused

__all__ = [
    "MeshShape",
    "build_device_mesh",
    "data_parallel_coords",
    "dp_world_size",
    "mesh_coords",
    "mesh_shape",
    "parse_parallelism_conf",
]

logger = logging.getLogger(__name__)
__getattr__ = refused(__name__)


def build_device_mesh(
    parallelism_conf: dict[str, Any], device: str = "cuda"
) -> tuple[DeviceMesh | None, dict[str, DeviceMesh]]:
    """Build the mesh over all ranks.

    Args:
        parallelism_conf: as `parse_parallelism_conf` returns it.
        device: "cuda", or "cpu".

    Returns:
        The mesh, with the dimensions among (dp, tp, domain) that are larger than 1, in that order, and the
        submesh of each; (None, {}) for one rank.

    Raises:
        ValueError: if the world does not divide, or holds several replicas that `data: none` would never join.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    shape = joined_mesh_shape(parallelism_conf, world_size)
    sizes = {name: size for name, size in shape._asdict().items() if size > 1}
    if not sizes:
        return None, {}
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    logger.info("mesh %s over %d ranks", " x ".join(f"{name} {size}" for name, size in sizes.items()), world_size)
    return mesh, {name: mesh[name] for name in sizes}


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
