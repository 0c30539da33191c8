"""What `credit check parity` does: is the config's model, sharded, the plain one?"""

from __future__ import annotations

import glob
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from credit.config import Config, Data
from credit.data.demo import write_demo
from credit.data.opening import is_remote
from credit.data.prepare import DEMO, open_fields, stores_of
from credit.domain_parallel import DomainParallelManager, ParityReport, verify_parity
from credit.domain_parallel.groups import ProcessRanks, RankGroup
from credit.domain_parallel.parity import Place, verify_parity_at
from credit.domain_parallel.thread_ranks import ThreadWorld
from credit.errors import ConfigError, DataError
from credit.launch.job import Job, choose_device
from credit.layout import MeshShape, groups
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.channels import ChannelGroup
from credit.parallel.collectives import local, together
from credit.parallel.tensor_parallel import cut_channels, cut_layers

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""What counts as exact, relative to the largest entry: rounding of a model's many sums."""


def check_parity(config: Config, dtype: str = "float64") -> ParityReport:
    """Verify the config's model with new weights on random fields of the config's grid, one sample, in `dtype`.

    The ranks of one replica, tensor x domain, are threads of this process. No field is read and no statistics are
    needed; the store is opened for its grid and channels, unless it is the demo's, which need not have been made.

    Raises:
        CreditError: if the model cannot be built, or the store does not have what the config names.
        DomainParallelError: if something in the model is refused.
    """
    model, fields = _subject(config, choose_device(0), print)
    parallelism = config.trainer.parallelism
    return parity_on_threads(config, model, fields, (parallelism.tensor, parallelism.domain), dtype)


def parity_on_threads(
    config: Config, model: nn.Module, fields: Tensor, mesh: tuple[int, int], dtype: str = "float64"
) -> ParityReport:
    """`verify_parity` of a plain model, as the config says, on tensor x domain threads of this process."""
    tensor, domain = mesh
    return verify_parity_at(
        lambda world: place_in(world, tensor, domain),
        model,
        (fields,),
        tensor * domain,
        custom_converters=DOMAIN_CONVERTERS,
        fallback=config.trainer.fallback,
        tolerance=TOLERANCES[dtype],
        dtype=getattr(torch, dtype),
        seed=config.trainer.seed,
    )


def check_parity_of(job: Job, dtype: str = "float64") -> ParityReport:
    """`check_parity` on the ranks of a job, whatever started them. Errors are every rank's."""
    model, fields = _subject(job.config, job.device, job.say)
    tp = job.mesh["tp"] if job.mesh is not None and job.shape.tp > 1 else None
    return verify_parity(
        model,
        (fields,),
        job.manager,
        custom_converters=DOMAIN_CONVERTERS,
        fallback=job.config.trainer.fallback,
        tolerance=TOLERANCES[dtype],
        dtype=getattr(torch, dtype),
        seed=job.config.trainer.seed,
        cut=None if tp is None else CutChannels(ChannelGroup(ProcessRanks(tp.get_group()), tp)),
    )


def _subject(config: Config, device: torch.device, say: Callable[[str], None]) -> tuple[nn.Module, Tensor]:
    """The model, and what to give it."""
    with together("opening the data"):
        in_channels, out_channels, grid = model_shape(config)
    torch.manual_seed(config.trainer.seed)
    with together("building the model"):
        try:
            model = build_model(config.model, in_channels, out_channels, grid, config.data.is_region)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    say(f"{config.model.name} on {in_channels} -> {out_channels} random fields of {grid[0]} x {grid[1]}")
    return model.to(device), torch.randn(1, in_channels, *grid, dtype=torch.float64).to(device)


def place_in(world: ThreadWorld, tensor: int, domain: int) -> Place:
    """Of one of tensor x domain threads, laid out as on the mesh."""
    shape = MeshShape(1, tensor, domain)

    def mine(dimension: str) -> RankGroup:
        return world.group(next(ranks for ranks in groups(shape, dimension) if world.rank in ranks))

    cut = CutChannels(ChannelGroup(mine("tp"))) if tensor > 1 else None
    return Place(DomainParallelManager.of_group(mine("domain")), cut)


class CutChannels:
    """For `verify_parity`: tensor parallelism over the ranks of `group`."""

    def __init__(self, group: ChannelGroup) -> None:
        self.group = group

    def apply(self, model: nn.Module) -> nn.Module:
        return cut_channels(model, self.group)

    def whole(self, model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(gradients)
        for path, layer in cut_layers(model):
            for name in sorted(layer._tp_cut):
                key = f"{path}.{name}" if path else name
                found[key] = layer.whole(local(gradients[key]))
        return found


SURFACE = re.compile(
    r"(2m|10m|100m|mean_|total_|surface_|sea_|snow|skin|boundary|convective|large_scale|top_)|.*(10|100|2m?)$|"
    r"(msl|sp|sst|skt|tp|cp|lsp|tcwv|tcw|tcc|ssrd|strd|ssr|str|ttr|sshf|slhf|sd|sic|ci|stl\d|swvl\d)$"
)
"""Names of fields without levels, in ERA5, CDS and WeatherBench 2."""


def _assumed(data: Data, name: str) -> int:
    """Channels of a variable that cannot be looked up."""
    return len(data.levels) if data.levels and not SURFACE.match(name) else 1


def _is_here(config: Config) -> bool:
    return any(
        is_remote(path) or Path(path).exists() or glob.glob(path) for one in stores_of(config) for path in one.path
    )


def assumption(config: Config) -> str:
    """What `model_shape` takes the fields to be, where it cannot look; nothing where it can."""
    data = config.data
    grid = data.assumed_grid
    if grid is None or _is_here(config):
        return ""
    flat = [name for name in data.predicted if _assumed(data, name) == 1]
    upper = [name for name in data.predicted if name not in flat]
    levels = f"{', '.join(upper)} on {len(data.levels)} levels" if upper else ""
    words = "; ".join(filter(None, [levels, f"{', '.join(flat)} without" if flat else ""]))
    return f"assumed, as {data.stores[0].path[0]} is not here: {grid[0]} x {grid[1]}, {words}"


def model_shape(config: Config) -> tuple[int, int, tuple[int, int]]:
    """Channels in and out, and the grid, as `credit.data.dataset.Fields` has them."""
    data = config.data
    if data.path == [DEMO] and not Path(stores_of(config)[0].path[0]).exists():
        grid = inspect.signature(write_demo).parameters["grid"].default
        return *config.model_channels(len(data.variables), len(data.diagnostics)), grid
    if data.assumed_grid is not None and not _is_here(config):
        state, diagnostics = (sum(map(partial(_assumed, data), names)) for names in (data.variables, data.diagnostics))
        return *config.model_channels(state, diagnostics), data.assumed_grid
    try:
        store = open_fields(config)
        state, diagnostics = (len(store.channels(names, data.levels)) for names in (data.variables, data.diagnostics))
    except DataError as error:
        raise DataError(f"{error}; the check needs the store for its grid and channels alone") from None
    return *config.model_channels(state, diagnostics), store.grid.shape
