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
from credit.parallel.parallelize import parallelize


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
    return parallelize(model, job.mesh, config.to_dict(), job.manager, DOMAIN_CONVERTERS)


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
