"""The arithmetic of the mesh (dp, tp, domain): which rank stands where, and which groups leave their node. No torch.

Ranks are row-major over (dp, tp, domain), domain innermost: rank = (dp * tp_size + tp) * domain_size + domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from credit.config.loading import said_of
from credit.config.parallelism import Conf, Parallelism, Sharding, trainer_of


class MeshShape(NamedTuple):
    """Sizes, or the coordinates of one rank, along the three dimensions of the mesh."""

    dp: int
    tp: int
    domain: int


class Seat(NamedTuple):
    """Where one rank is: by number on the list of all seats."""

    host: str
    device: str


def parse_parallelism_conf(conf: Conf) -> dict[str, Any]:
    """The normalised `trainer.parallelism` block of a training config.

    Args:
        conf: the whole config as a dictionary, in which the block may be missing (one device) or incomplete; or its
            `Sharding`.

    Returns:
        {"data": "fsdp2" | "ddp" | "none", "tensor": int, "domain": int}

    Raises:
        ValueError: on an unknown key or data mode, or a degree that is not a positive integer; if it is given the
            `trainer` block alone, which would else pass for a config without one.
    """
    if isinstance(conf, Sharding):
        return conf.parallelism.model_dump()
    if "parallelism" in conf and "trainer" not in conf:
        raise ValueError("parallelism stands at the top: give the whole config, {'trainer': {'parallelism': ...}}")
    with said_of("trainer", "parallelism"):
        return Parallelism.model_validate(dict(trainer_of(conf)).pop("parallelism", None) or {}).model_dump()


def dp_world_size(parallelism_conf: dict[str, Any], world_size: int) -> int:
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


def mesh_shape(parallelism_conf: dict[str, Any], world_size: int) -> MeshShape:
    """Sizes of (dp, tp, domain) for `world_size` ranks."""
    dp = dp_world_size(parallelism_conf, world_size)
    return MeshShape(dp, parallelism_conf["tensor"], parallelism_conf["domain"])


def joined_mesh_shape(parallelism_conf: dict[str, Any], world_size: int) -> MeshShape:
    """`mesh_shape` of ranks that are to train together.

    Raises:
        ValueError: if the world does not divide, or holds several replicas that `data: none` would never join.
    """
    shape = mesh_shape(parallelism_conf, world_size)
    if shape.dp > 1 and parallelism_conf["data"] == "none":
        raise ValueError(
            f"{world_size} ranks make {shape.dp} replicas, which data: none would train apart from each other: "
            f"set trainer.parallelism.data to ddp or fsdp2, or start {world_size // shape.dp} ranks"
        )
    return shape


def mesh_coords(shape: MeshShape, rank: int) -> MeshShape:
    """Coordinates of a global rank."""
    return MeshShape(rank // (shape.tp * shape.domain), rank // shape.domain % shape.tp, rank % shape.domain)


def groups(shape: MeshShape, dimension: str) -> Iterator[list[int]]:
    """The ranks of each group along "dp", "tp" or "domain"."""
    axis = MeshShape._fields.index(dimension)
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(shape.dp * shape.tp * shape.domain):
        coords = mesh_coords(shape, rank)
        members.setdefault((*coords[:axis], *coords[axis + 1 :]), []).append(rank)
    yield from members.values()


def straddling(shape: MeshShape, hosts: Sequence[str]) -> list[str]:
    """A warning for each of tp and domain whose groups leave their node, by the hosts of all ranks."""
    lines = []
    for dimension in ("domain", "tp"):
        size = getattr(shape, dimension)
        torn = [group for group in groups(shape, dimension) if len({hosts[rank] for rank in group}) > 1]
        if not torn:
            continue
        on = ", ".join(dict.fromkeys(hosts[rank] for rank in torn[0]))
        replica = shape.tp * shape.domain
        fewest = min(Counter(hosts).values())
        why = f"a replica has {replica} ranks and a node {fewest}"
        if fewest % replica == 0:
            why = "the ranks are not the same number on every node"
        lines.append(
            f"warning: {len(torn)} of {len(hosts) // size} {dimension} groups straddle nodes (ranks {torn[0][0]} to "
            f"{torn[0][-1]}: {on}), so their messages take the network: {why}"
        )
    return lines


def table(shape: MeshShape, seats: Sequence[Seat]) -> str:
    """One line a rank: rank, host, device, coordinates; then the warnings of `straddling`."""
    width = max(4, *(len(seat.host) for seat in seats))
    lines = [f"rank  {'host':{width}s}  device    dp   tp  domain"]
    for rank, seat in enumerate(seats):
        dp, tp, domain = mesh_coords(shape, rank)
        lines.append(f"{rank:4d}  {seat.host:{width}s}  {seat.device:7s} {dp:4d} {tp:4d} {domain:7d}")
    return "\n".join([*lines, *straddling(shape, [seat.host for seat in seats])])
