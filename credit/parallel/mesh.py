"""The mesh (dp, tp, domain): one place for its arithmetic, and for who reads which samples.

Ranks are row-major over (dp, tp, domain), domain innermost: rank = (dp * tp_size + tp) * domain_size + domain.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

logger = logging.getLogger(__name__)

DATA_MODES = ("fsdp2", "ddp", "none")
DEFAULTS: dict[str, Any] = {"data": "none", "tensor": 1, "domain": 1}


class MeshShape(NamedTuple):
    """Sizes, or the coordinates of one rank, along the three dimensions of the mesh."""

    dp: int
    tp: int
    domain: int


def parse_parallelism_conf(conf: dict) -> dict:
    """The normalised `trainer.parallelism` block of a training config.

    Args:
        conf: the whole config; the block may be missing (one device) or incomplete.

    Returns:
        {"data": "fsdp2" | "ddp" | "none", "tensor": int, "domain": int}

    Raises:
        ValueError: on an unknown key or data mode, or a degree that is not a positive integer.
    """
    block = (conf.get("trainer") or {}).get("parallelism") or {}
    for key in block:
        if key not in DEFAULTS:
            near = difflib.get_close_matches(key, DEFAULTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(DEFAULTS)}"
            raise ValueError(f"trainer.parallelism: unknown key {key!r}{hint}")
    parsed = {**DEFAULTS, **block}
    if parsed["data"] not in DATA_MODES:
        raise ValueError(f"trainer.parallelism.data is {parsed['data']!r}, not one of {', '.join(DATA_MODES)}")
    for key in ("tensor", "domain"):
        if not isinstance(parsed[key], int) or isinstance(parsed[key], bool) or parsed[key] < 1:
            raise ValueError(f"trainer.parallelism.{key} must be an integer of at least 1, got {parsed[key]!r}")
    return parsed


def dp_world_size(parallelism_conf: dict, world_size: int) -> int:
    """Number of data-parallel replicas: world_size / (tensor * domain).

    Raises:
        ValueError: if `world_size` does not divide, naming the world sizes nearby that do.
    """
    tensor, domain = parallelism_conf["tensor"], parallelism_conf["domain"]
    replica = tensor * domain
    if world_size % replica:
        below, above = world_size // replica * replica, -(-world_size // replica) * replica
        choices = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{world_size} ranks do not divide into replicas of tensor {tensor} x domain {domain} = {replica} ranks: "
            f"start {choices} ranks, or change trainer.parallelism"
        )
    return world_size // replica


def mesh_shape(parallelism_conf: dict, world_size: int) -> MeshShape:
    """Sizes of (dp, tp, domain) for `world_size` ranks."""
    dp = dp_world_size(parallelism_conf, world_size)
    return MeshShape(dp, parallelism_conf["tensor"], parallelism_conf["domain"])


def mesh_coords(shape: MeshShape, rank: int) -> MeshShape:
    """Coordinates of a global rank."""
    return MeshShape(rank // (shape.tp * shape.domain), rank // shape.domain % shape.tp, rank % shape.domain)


def build_device_mesh(parallelism_conf: dict, device: str = "cuda") -> tuple[DeviceMesh | None, dict[str, DeviceMesh]]:
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
    shape = mesh_shape(parallelism_conf, world_size)
    if shape.dp > 1 and parallelism_conf["data"] == "none":
        raise ValueError(
            f"{world_size} ranks make {shape.dp} replicas, which data: none would train apart from each other: "
            f"set trainer.parallelism.data to ddp or fsdp2, or start {world_size // shape.dp} ranks"
        )
    sizes = {name: size for name, size in shape._asdict().items() if size > 1}
    if not sizes:
        return None, {}
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    logger.info("mesh %s over %d ranks", " x ".join(f"{name} {size}" for name, size in sizes.items()), world_size)
    return mesh, {name: mesh[name] for name in sizes}


def data_parallel_coords(conf: dict) -> tuple[int, int]:
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
