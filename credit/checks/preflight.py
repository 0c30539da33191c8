"""`credit check CONFIG`: everything about a run that can be checked without starting ranks."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from credit.boundary import CAUGHT, leave_tracebacks_in
from credit.checks.parity import model_shape
from credit.config import Config, load_config
from credit.data.dataset import Fields
from credit.data.prepare import is_made, load_fields_statistics, open_fields
from credit.data.store import FieldStore
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError, CreditError, DataError
from credit.findings import Finding
from credit.layout import joined_mesh_shape, mesh_shape
from credit.models import build_model
from credit.models.constraints import build_constraints
from credit.parallel.checkpoint import list_checkpoints
from credit.parallel.collectives import USER_ERRORS
from credit.parallel.weights import freeze, load_plain
from credit.status import read_status
from credit.training.log import refuse_missing_tensorboard
from credit.training.loss import LatitudeWeightedLoss
from credit.training.schedule import Schedule
from credit.training.slicing import planner_of

Shape = tuple[int, int, tuple[int, int]]
"""See `model_shape`."""


def preflight(path: str, changes: Sequence[str], ranks: int | None) -> list[Finding]:
    """All findings for `ranks` ranks, one replica by default."""
    try:
        config = load_config(path, changes)
    except ConfigError as error:
        return [Finding.of(problem, "config") for problem in error.problems]
    leave_tracebacks_in(config.run)
    opened, shaped = cache(partial(open_fields, config)), cache(partial(model_shape, config))
    parts = {
        "data": _data(config, opened),
        "trainer.parallelism": _mesh(config, ranks, shaped),
        "model": _model(config, ranks, shaped),
        "trainer": _beside_the_model(config, opened),
    }
    found = [Finding("ok", "config", f"{path} is valid, digest {config.digest}")]
    for where, part in {**parts, "run": _run(config)}.items():
        try:
            found += part
        except CAUGHT as error:  # a module of the user's, a store: whatever they raise would stop a job, too
            found += [Finding.of(error, where)]
    return found


def _data(config: Config, opened: Callable[[], FieldStore]) -> Iterator[Finding]:
    data = config.data
    if not is_made(config):
        yield Finding("ok", "data.path", f"{data.path[0]} is made in {config.run} when training starts")
        return
    try:
        store = opened()
    except CreditError as error:
        yield Finding.of(error, "data.path")
        return
    rows, columns = store.grid.shape
    yield Finding("ok", "data.path", f"{store}, {len(store.times)} times on {rows} x {columns}")
    try:
        store.grid.at_edge(data.boundary)
    except CreditError as error:
        yield Finding.of(error, "data.boundary")
    try:
        load_fields_statistics(config, store)
    except CreditError as error:
        yield Finding.of(error, "data.stats")
    for period in ("train", "valid", "test"):
        steps = 1 if period == "test" else config.trainer.rollout
        try:
            starts = store.starts(getattr(data, period), data.step, steps, data.gaps, data.history)
        except CreditError as error:
            yield Finding.of(error, f"data.{period}")
            continue
        samples, unreadable = len(starts), _unreadable(config, store, starts)
        if unreadable:
            more = f" (and {len(unreadable) - 1} more variables)" if len(unreadable) > 1 else ""
            yield Finding("error", f"data.{period}", f"{unreadable[0]}{more}")
        if period == "train" and samples < config.trainer.batch_size:
            said = f"{samples} samples do not fill a batch of {config.trainer.batch_size}"
            yield Finding("error", "data.train", said, "a longer period, or a smaller trainer.batch_size")
        else:
            said = "; ".join([f"{samples} samples", *store.notes])
            yield Finding("warning" if store.notes else "ok", f"data.{period}", said)


def _unreadable(config: Config, store: FieldStore, starts: np.ndarray) -> list[str]:
    """What is wrong with each variable at the first of these times, the last, and one between."""
    data, found = config.data, []
    chosen = sorted({int(starts[0]), random.Random(len(starts)).choice(starts.tolist()), int(starts[-1])})
    rows = range(store.grid.shape[0])
    for name in (*data.predicted, *data.given):
        try:
            if name in data.statics:
                store.read_static(name, rows)
            else:
                store.read(store.channels([name], data.levels if name in data.predicted else ()), chosen, rows)
        except DataError as error:
            found.append(str(error))
    return found


def _ranks(config: Config, ranks: int | None) -> int:
    parallelism = config.trainer.parallelism
    return ranks or parallelism.tensor * parallelism.domain


def _mesh(config: Config, ranks: int | None, shaped: Callable[[], Shape]) -> Iterator[Finding]:
    trainer, number = config.trainer, _ranks(config, ranks)
    where = "trainer.parallelism"
    try:
        shape = joined_mesh_shape(trainer.parallelism.model_dump(), number)
    except ValueError as error:
        yield Finding("error", where, str(error))
        return
    yield Finding("ok", where, f"{number} ranks: dp {shape.dp} x tp {shape.tp} x domain {shape.domain}")
    if trainer.batch_size % (shape.dp * trainer.accumulate):
        said = f"{trainer.batch_size} does not divide over {shape.dp} replicas x accumulate {trainer.accumulate}"
        yield Finding("error", "trainer.batch_size", said, f"a multiple of {shape.dp * trainer.accumulate}")
    try:
        latitudes = shaped()[2][0]
    except CreditError:
        return  # said of the data
    if latitudes < shape.domain:
        said = f"{latitudes} latitudes cannot be cut over {shape.domain} ranks"
        yield Finding("error", f"{where}.domain", said, f"at most {latitudes}")
        return
    sizes = Partition(latitudes, shape.domain).sizes
    yield Finding("ok", f"{where}.domain", f"{latitudes} latitudes, {min(sizes)} to {max(sizes)} a rank")
    if max(sizes) > 1.25 * min(sizes):
        said = f"{latitudes} latitudes leave ranks {min(sizes)} to {max(sizes)} rows: some wait for others"
        yield Finding("warning", f"{where}.domain", said, "a smaller domain")


def _model(config: Config, ranks: int | None, shaped: Callable[[], Shape]) -> Iterator[Finding]:
    """Builds the model on tensors without values and runs one rank's step on them, as `credit plan` does."""
    trainer, name = config.trainer, config.model.name
    try:
        inputs, outputs, grid = shaped()
    except CreditError:
        return
    try:
        with torch.device("meta"):
            model = build_model(config.model, inputs, outputs, grid, config.data.is_region)
    except (ConfigError, ValueError) as error:
        yield Finding.of(error, "model") if isinstance(error, ConfigError) else Finding("error", "model", str(error))
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Finding("ok", "model", f"{name}, {parameters:,} parameters, {inputs} -> {outputs} channels")
    yield from _weights(config, model)
    try:
        cost = planner_of(config, shaped()).cost(mesh_shape(trainer.parallelism.model_dump(), _ranks(config, ranks)))
    except USER_ERRORS as error:
        yield Finding("error", "model", str(error).splitlines()[0], "another trainer.parallelism, or see the message")
        return
    except ValueError:
        return  # said of the mesh
    yield Finding("ok", "model", f"a rank needs {cost.memory / 1e9:.3f} GB; see credit plan for other meshes")


def _weights(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Are the weights to start from there, and of this model, and is something trained?"""
    trainer = config.trainer
    try:
        if trainer.init_from is not None:
            given = trainer.init_from
            with warnings.catch_warnings(action="ignore"):  # values that are given to tensors without any
                words = load_plain(model, Path(given.path), given.only, given.skip)
            yield Finding("ok", "trainer.init_from", words)
        freeze(model, trainer.freeze)
    except CreditError as error:
        yield Finding.of(error, "trainer.init_from")


def _beside_the_model(config: Config, opened: Callable[[], FieldStore]) -> Iterator[Finding]:
    """What else training builds, of the user's own or not."""
    if not is_made(config):
        return
    try:
        store = opened()
        statistics = load_fields_statistics(config, store)
        once = config.model_copy(update={"data": config.data.model_copy(update={"in_memory": False})})
        fields = Fields(once, store, statistics, range(1))
    except CreditError:
        return  # said of the data
    trainer, names, edge = config.trainer, fields.predicted, config.data.boundary
    areas = torch.from_numpy(store.grid.latitude_weights())[:, None]
    built: dict[str, Callable[[], object]] = {
        "trainer.loss": lambda: LatitudeWeightedLoss(trainer.loss, store.grid, range(1), names, fields.mask, edge),
        "trainer.schedule": lambda: Schedule(trainer, [trainer.epochs], 1),
        "constraints": lambda: build_constraints(config.constraints, names, areas),
    }
    for where, build in built.items():
        try:
            build()
        except CAUGHT as error:
            yield Finding.of(error, where)


def _run(config: Config) -> Iterator[Finding]:
    try:
        refuse_missing_tensorboard(config.trainer.tensorboard)
    except ConfigError as error:
        yield Finding.of(error, "trainer.tensorboard")
    place = next(one for one in (config.run, *config.run.absolute().parents) if one.exists())
    if not os.access(place, os.W_OK):
        yield Finding("error", "run", f"{config.run} cannot be written", "another directory")
        return
    found = list_checkpoints(config.run / "checkpoints")
    line, _ = read_status(config.run)
    yield Finding("ok", "run", f"{line}; {len(found)} checkpoints" if found else f"{config.run}: starts from scratch")
