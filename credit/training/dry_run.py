"""What `credit train --dry-run` checks and prints, without starting ranks."""

from __future__ import annotations

from credit.config import Config
from credit.data.prepare import is_built_in, load_fields_statistics, store_path
from credit.data.store import FieldStore
from credit.domain_parallel.partition import Partition
from credit.launch.job import checked_mesh_shape
from credit.parallel.mesh import mesh_coords


def dry_run(config: Config, world_size: int | None) -> str:
    """The layout of `world_size` ranks (the smallest that fits by default), and of the data over them.

    Raises:
        CreditError: what starting the job would raise.
    """
    parallelism = config.trainer.parallelism
    ranks = world_size or parallelism.tensor * parallelism.domain
    shape = checked_mesh_shape(config, ranks)
    lines = [f"{ranks} ranks: mesh dp {shape.dp} x tp {shape.tp} x domain {shape.domain} ({parallelism.data})"]
    path = store_path(config)
    rows: Partition | None = None
    if is_built_in(config) and not (path.exists() and config.stats_path.exists()):
        lines.append(f"data: {config.data.path}, to be made in {config.run}")
    else:
        store = FieldStore(path)
        load_fields_statistics(config, store)
        samples = len(store.starts(config.data.train, config.data.step_hours, config.trainer.rollout, config.data.gaps))
        lines.append(f"data: {path}, {store.grid.shape[0]} x {store.grid.shape[1]}, {samples} training samples")
        rows = Partition(store.grid.shape[0], shape.domain)
    lines.append("rank    dp    tp  domain  latitude rows")
    for rank in range(ranks):
        at = mesh_coords(shape, rank)
        span = f"{rows.range(at.domain).start}..{rows.range(at.domain).stop - 1}" if rows else "-"
        lines.append(f"{rank:4d}  {at.dp:4d}  {at.tp:4d}  {at.domain:6d}  {span}")
    return "\n".join(lines)
