"""What training and forecasting start from: the store, and the model laid out on the mesh."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from credit.data.dataset import Fields
from credit.data.prepare import load_fields_statistics, make_built_in, store_path
from credit.data.statistics import Statistics
from credit.data.store import FieldStore
from credit.errors import ConfigError, CreditError
from credit.launch.job import Job
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.checkpoint import load_plain
from credit.parallel.collectives import gather_objects, together
from credit.parallel.look import Look, look_at
from credit.parallel.parallelize import cut, replicate


def open_store(job: Job) -> tuple[FieldStore, Statistics]:
    """The config's store and statistics; rank 0 makes what comes with the package first.

    Raises:
        CreditError: on every rank, if either is missing or damaged, or has fewer latitudes than domain ranks.
    """
    with together("preparing the data"):
        if job.is_first:
            make_built_in(job.config)
    with together("opening the data"):
        store = FieldStore(store_path(job.config))
        statistics = load_fields_statistics(job.config, store)
        if store.grid.shape[0] < job.shape.domain:
            raise ConfigError(f"{store.grid.shape[0]} latitudes cannot be cut over domain: {job.shape.domain}")
    return store, statistics


def prepare_model(job: Job, fields: Fields) -> nn.Module:
    """The config's model on this rank's device, cut by latitude, replicated or sharded over the mesh.

    Raises:
        CreditError: on every rank, if the initial weights differ between ranks.
    """
    return replicate(_cut_model(job, fields), job.mesh, job.config.to_dict())


def prepare_training(job: Job, fields: Fields) -> tuple[nn.Module, Look]:
    """`prepare_model`, and what was seen of the model before it was replicated.

    Raises:
        ConfigError: on every rank, if its numbers would depend on how a batch is shared out.
    """
    trainer = job.config.trainer
    model, dtype = _cut_model(job, fields), getattr(torch, trainer.dtype)
    generator = torch.Generator().manual_seed(hash((trainer.seed, job.coords.domain)) % 2**63)
    shape = (2, fields.input_channels, len(fields.rows), fields.store.grid.shape[1])
    two = torch.randn(shape, generator=generator).to(job.device, dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=trainer.amp == "bf16"):
            return model(x)

    with together("looking at the model"):
        look = look_at(model, forward, two, is_shared_out=job.shape.dp > 1 or trainer.accumulate > 1)
        if trainer.compile and look.draws:
            raise ConfigError(
                "trainer.compile: what the model draws (dropout, stochastic depth) cannot be drawn sample by sample in "
                "compiled blocks: leave it out"
            )
    return replicate(model, job.mesh, job.config.to_dict(), look.unused), look


def _cut_model(job: Job, fields: Fields) -> nn.Module:
    config = job.config
    torch.manual_seed(config.trainer.seed)
    with together("building the model"):
        compiler = os.environ.get("CXX", "g++")
        if config.trainer.compile and shutil.which(compiler) is None:
            raise ConfigError(f"trainer.compile needs a C++ compiler, and there is no {compiler} here: leave it out")
        try:
            model = build_model(config.model, fields.input_channels, len(fields.predicted), fields.store.grid.shape)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    model = model.to(job.device, getattr(torch, config.trainer.dtype))
    if config.trainer.init_from is not None:
        with together("reading trainer.init_from"):
            load_plain(model, Path(config.trainer.init_from))
    _refuse_unequal_weights(model)
    return cut(model, job.mesh, config.to_dict(), job.manager, DOMAIN_CONVERTERS)


def _refuse_unequal_weights(model: nn.Module) -> None:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests = gather_objects(digest.hexdigest())
    if len(set(digests)) > 1:
        odd = [rank for rank, one in enumerate(digests) if one != digests[0]]
        raise CreditError(
            f"initial weights on ranks {odd} differ from rank 0's: the model draws from something unseeded"
        )
