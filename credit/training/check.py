"""What `credit check parity` does: is the config's model, sharded, the plain one?"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from credit.config import Config
from credit.data.demo import write_demo
from credit.data.prepare import DEMO, store_path
from credit.data.store import FieldStore
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


def check_parity(config: Config) -> ParityReport:
    """Verify the config's model with new weights on random fields of the config's grid, one sample, in float64.

    The ranks of one replica, tensor x domain, are threads of this process. No field is read and no statistics are
    needed; the store is opened for its grid and channels, unless it is the demo's, which need not have been made.

    Raises:
        CreditError: if the model cannot be built, or the store does not have what the config names.
        DomainParallelError: if something in the model is refused.
    """
    model, fields = _subject(config, choose_device(0), print)
    tensor, domain = config.trainer.parallelism.tensor, config.trainer.parallelism.domain
    return verify_parity_at(
        lambda world: place_in(world, tensor, domain),
        model,
        (fields,),
        tensor * domain,
        custom_converters=DOMAIN_CONVERTERS,
        fallback=config.trainer.fallback,
        seed=config.trainer.seed,
    )


def check_parity_of(job: Job) -> ParityReport:
    """`check_parity` on the ranks of a job, whatever started them. Errors are every rank's."""
    model, fields = _subject(job.config, job.device, job.say)
    tp = job.mesh["tp"] if job.mesh is not None and job.shape.tp > 1 else None
    return verify_parity(
        model,
        (fields,),
        job.manager,
        custom_converters=DOMAIN_CONVERTERS,
        fallback=job.config.trainer.fallback,
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
            model = build_model(config.model, in_channels, out_channels, grid)
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


def model_shape(config: Config) -> tuple[int, int, tuple[int, int]]:
    """Channels in and out, and the grid, as `credit.data.dataset.Fields` has them."""
    data, path = config.data, store_path(config)
    given = config.given_channels
    if data.path == DEMO and not path.exists():
        grid = inspect.signature(write_demo).parameters["grid"].default
        return len(data.variables) + given, len(data.variables), grid
    try:
        store = FieldStore(path)
        predicted = len(store.channels(data.variables, data.levels))
    except DataError as error:
        raise DataError(f"{error}; the check needs the store for its grid and channels alone") from None
    return predicted + given, predicted, store.grid.shape
