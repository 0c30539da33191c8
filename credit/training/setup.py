"""What training and forecasting start from: the store, and the model laid out on the mesh."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from credit.config import InitFrom
from credit.data.dataset import Fields
from credit.data.prepare import load_fields_statistics, make_built_in, open_analysis, open_fields
from credit.data.shared import Folder, SharedReads
from credit.data.statistics import Statistics
from credit.data.store import FieldStore
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.slices import slices
from credit.errors import ConfigError, CreditError, Stopped
from credit.launch.job import Job
from credit.layout import mesh_coords
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.models.constraints import Constrained, build_constraints
from credit.parallel.collectives import gather_objects, together
from credit.parallel.look import Look, look_at
from credit.parallel.parallelize import cut, replicate
from credit.parallel.weights import freeze, load_plain
from credit.stop import StopRequest
from credit.training.slicing import choose_slices


def open_store(job: Job, request: StopRequest | None = None, analysis: bool = False) -> tuple[FieldStore, Statistics]:
    """The config's store and statistics; rank 0 makes what comes with the package first.

    Args:
        analysis: open what one forecast starts from.

    Raises:
        CreditError: on every rank, if either is missing or damaged, or has fewer latitudes than domain ranks.
        Stopped: on every rank, if rank 0 is asked to stop while it makes data.
    """
    stopped = None
    with together("preparing the data"):
        if job.is_first:
            try:
                make_built_in(job.config, request)
            except Stopped as error:
                stopped = str(error)
    stopped = gather_objects(stopped)[0]
    if stopped is not None:
        raise Stopped(stopped)
    with together("opening the data"):
        store = (open_analysis if analysis else open_fields)(job.config)
        names = job.config.data.variables if analysis else None
        statistics = load_fields_statistics(job.config, store, names)
        if store.grid.shape[0] < job.shape.domain:
            raise ConfigError(f"{store.grid.shape[0]} latitudes cannot be cut over domain: {job.shape.domain}")
    store.share(_shared_reads(job, store.grid.shape[0]))
    return store, statistics


def _shared_reads(job: Job, latitudes: int) -> SharedReads | None:
    """With the ranks of this node that take the same samples, if there are any."""
    if job.shape.tp * job.shape.domain == 1:
        return None
    coords = [mesh_coords(job.shape, rank) for rank in range(job.ranks.world_size)]
    near = [
        rank
        for rank, (seat, at) in enumerate(zip(job.seats, coords, strict=True))
        if seat.host == job.seats[job.ranks.rank].host and at.dp == job.coords.dp
    ]
    place, owned = near.index(job.ranks.rank), None
    if place == 0 and len(near) > 1:
        with suppress(OSError):  # there is no such memory, or we may not write there
            owned = Folder()
    folder = gather_objects(None if owned is None else str(owned.path))[near[0]]
    # Ranks in containers of their own may have one host's name, and not its memory.
    seen = gather_objects(folder is not None and Path(folder).is_dir())
    if folder is None or not all(seen[rank] for rank in near):
        return None
    partition = Partition(latitudes, job.shape.domain)
    return SharedReads(folder, place, [partition.range(coords[rank].domain) for rank in near], owned)


def prepare_model(job: Job, fields: Fields, weights: InitFrom | None = None) -> nn.Module:
    """The config's model on this rank's device, cut by latitude, replicated or sharded over the mesh.

    Args:
        weights: to read; those of a checkpoint are yet to be.

    Raises:
        CreditError: on every rank, if the initial weights differ between ranks.
    """
    return replicate(_cut_model(job, fields, weights, is_training=False), job.mesh, job.config.trainer)


def prepare_training(job: Job, fields: Fields) -> tuple[nn.Module, Look]:
    """`prepare_model`, and what was seen of the model before it was replicated.

    Raises:
        ConfigError: on every rank, if its numbers would depend on how a batch is shared out.
    """
    trainer = job.config.trainer
    model, dtype = _cut_model(job, fields, trainer.init_from, is_training=True), getattr(torch, trainer.dtype)
    generator = torch.Generator().manual_seed(hash((trainer.seed, job.coords.domain)) % 2**63)
    shape = (2, fields.input_channels, len(fields.rows), fields.store.grid.shape[1])
    two = torch.randn(shape, generator=generator).to(job.device, dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=trainer.precision == "bf16"):
            return model(x)

    with together("looking at the model"):
        look = look_at(model, forward, two, is_shared_out=job.shape.dp > 1 or trainer.accumulate > 1)
        if trainer.compile and look.draws:
            raise ConfigError(
                "trainer.compile: what the model draws (dropout, stochastic depth) cannot be drawn sample by sample in "
                "compiled blocks: leave it out"
            )
    return replicate(model, job.mesh, job.config.trainer, look.unused), look


def _cut_model(job: Job, fields: Fields, weights: InitFrom | None, is_training: bool) -> nn.Module:
    config = job.config
    torch.manual_seed(config.trainer.seed)
    with together("building the model"):
        compiler = os.environ.get("CXX", "g++")
        if config.trainer.compile and shutil.which(compiler) is None:
            raise ConfigError(f"trainer.compile needs a C++ compiler, and there is no {compiler} here: leave it out")
        try:
            channels, grid = (fields.input_channels, len(fields.predicted)), fields.store.grid
            model = build_model(config.model, *channels, grid.shape, grid.region)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    model = model.to(job.device, getattr(torch, config.trainer.dtype))
    if weights is not None:
        with together("reading weights"):
            words = load_plain(model, Path(weights.path), weights.only, weights.skip)
        job.say(f"weights: {words}")
    with together("reading trainer.freeze"):
        freeze(model, config.trainer.freeze)
    if config.constraints:
        with together("building the constraints"):
            model = _constrained(model, fields).to(job.device)
    _refuse_unequal_weights(model)
    model = cut(model, job.mesh, config.trainer, job.manager, DOMAIN_CONVERTERS)
    number = choose_slices(job, (*channels, grid.shape), is_training)
    slices(model, number, custom_converters=DOMAIN_CONVERTERS, fallback=config.trainer.fallback)
    return model


def _constrained(model: nn.Module, fields: Fields) -> nn.Module:
    areas = torch.from_numpy(fields.store.grid.latitude_weights())[:, None]
    constraints = build_constraints(fields.config.constraints, fields.predicted, areas)
    unit = fields.channel_unit.double()
    return Constrained(model, constraints, *fields.moments(), unit, fields.state_channels)


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
