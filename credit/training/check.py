"""What `credit check` does: is the config's model, sharded, the plain one?"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from credit.config import Config
from credit.data.demo import write_demo
from credit.data.prepare import DEMO, store_path
from credit.data.store import FieldStore
from credit.domain_parallel import ParityReport, verify_parity
from credit.errors import ConfigError, DataError
from credit.launch.job import Job
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.collectives import together
from credit.parallel.pieces import in_pieces, whole
from credit.parallel.tensor_parallel import apply_tensor_parallel


def check_parity(job: Job) -> ParityReport:
    """Verify the config's model with new weights on random fields of the config's grid, one sample, in float64.

    No field is read and no statistics are needed; the store is opened for its grid and channels, unless it is the
    demo's, which need not have been made.

    Raises:
        CreditError: on every rank, if the model cannot be built, or the store does not have what the config names.
        DomainParallelError: if something in the model is refused.
    """
    config = job.config
    with together("opening the data"):
        in_channels, out_channels, grid = model_shape(config)
    torch.manual_seed(config.trainer.seed)
    with together("building the model"):
        try:
            model = build_model(config.model, in_channels, out_channels, grid)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    job.say(f"{config.model.name} on {in_channels} -> {out_channels} random fields of {grid[0]} x {grid[1]}")
    fields = torch.randn(1, in_channels, *grid, dtype=torch.float64)
    return verify_parity(
        model.to(job.device),
        (fields.to(job.device),),
        job.manager,
        custom_converters=DOMAIN_CONVERTERS,
        seed=config.trainer.seed,
        cut=CutChannels(job.mesh["tp"]) if job.mesh is not None and job.shape.tp > 1 else None,
    )


class CutChannels:
    """For `verify_parity`: tensor parallelism."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def apply(self, model: nn.Module) -> nn.Module:
        return apply_tensor_parallel(model, self.mesh)

    def whole(self, model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole(gradient) for name, gradient in in_pieces(model, gradients).items()}


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
