"""`credit check CONFIG`: everything about a run that can be checked without starting ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import torch

from credit.config import Config, load_config
from credit.data.prepare import is_built_in, load_fields_statistics, store_path
from credit.data.store import FieldStore
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError, CreditError
from credit.findings import Finding
from credit.layout import mesh_shape
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.checkpoint import list_checkpoints
from credit.parallel.collectives import USER_ERRORS
from credit.parallel.plan import Planner
from credit.status import read_status
from credit.training.check import model_shape
from credit.training.log import refuse_missing_tensorboard


def preflight(path: str, changes: Sequence[str], ranks: int | None) -> list[Finding]:
    """All findings for `ranks` ranks, one replica by default."""
    try:
        config = load_config(path, changes)
    except ConfigError as error:
        return [_from_message(problem) for problem in error.problems]
    parts = (_data(config), _mesh(config, ranks), _model(config, ranks), _run(config))
    return [Finding("ok", "config", f"{path} is valid, digest {config.digest}"), *(f for part in parts for f in part)]


def _from_message(problem: str) -> Finding:
    """The message names the key, in one of the ways of `credit.config`."""
    named = re.match(r"(?:unknown key )?([\w.]+)(?:; |: | is missing)", problem)
    return Finding("error", named[1] if named else "config", problem)


def _data(config: Config) -> Iterator[Finding]:
    data, path = config.data, store_path(config)
    if is_built_in(config) and not (path.exists() and config.stats_path.exists()):
        yield Finding("ok", "data.path", f"{data.path} is made in {config.run} when training starts")
        return
    try:
        store = FieldStore(path)
    except CreditError as error:
        yield Finding("error", "data.path", str(error))
        return
    rows, columns = store.grid.shape
    yield Finding("ok", "data.path", f"{path}, {len(store.times)} times on {rows} x {columns}")
    try:
        load_fields_statistics(config, store)
    except CreditError as error:
        yield Finding("error", "data.stats", str(error), "credit data stats CONFIG")
    for period in ("train", "valid", "test"):
        steps = 1 if period == "test" else config.trainer.rollout
        try:
            samples = len(store.starts(getattr(data, period), data.step_hours, steps, data.gaps))
        except CreditError as error:
            yield Finding("error", f"data.{period}", str(error))
            continue
        if period == "train" and samples < config.trainer.batch_size:
            said = f"{samples} samples do not fill a batch of {config.trainer.batch_size}"
            yield Finding("error", "data.train", said, "a longer period, or a smaller trainer.batch_size")
        else:
            yield Finding("ok", f"data.{period}", f"{samples} samples")


def _ranks(config: Config, ranks: int | None) -> int:
    parallelism = config.trainer.parallelism
    return ranks or parallelism.tensor * parallelism.domain


def _mesh(config: Config, ranks: int | None) -> Iterator[Finding]:
    trainer, number = config.trainer, _ranks(config, ranks)
    where = "trainer.parallelism"
    try:
        shape = mesh_shape(trainer.parallelism.model_dump(), number)
    except ValueError as error:
        yield Finding("error", where, str(error))
        return
    if shape.dp > 1 and trainer.parallelism.data == "none":
        said = f"{number} ranks make {shape.dp} replicas, which data: none would train apart"
        yield Finding("error", f"{where}.data", said, f"ddp or fsdp2, or {number // shape.dp} ranks")
        return
    yield Finding("ok", where, f"{number} ranks: dp {shape.dp} x tp {shape.tp} x domain {shape.domain}")
    if trainer.batch_size % (shape.dp * trainer.accumulate):
        said = f"{trainer.batch_size} does not divide over {shape.dp} replicas x accumulate {trainer.accumulate}"
        yield Finding("error", "trainer.batch_size", said, f"a multiple of {shape.dp * trainer.accumulate}")
    try:
        latitudes = model_shape(config)[2][0]
    except CreditError:
        return  # said of the data
    if latitudes < shape.domain:
        said = f"{latitudes} latitudes cannot be cut over {shape.domain} ranks"
        yield Finding("error", f"{where}.domain", said, f"at most {latitudes}")
        return
    sizes = Partition(latitudes, shape.domain).sizes
    if max(sizes) > 1.25 * min(sizes):
        said = f"{latitudes} latitudes leave ranks {min(sizes)} to {max(sizes)} rows: some wait for others"
        yield Finding("warning", f"{where}.domain", said, "a smaller domain")


def _model(config: Config, ranks: int | None) -> Iterator[Finding]:
    """Builds the model on tensors without values and runs one rank's step on them, as `credit plan` does."""
    trainer, name = config.trainer, config.model.name
    try:
        inputs, outputs, grid = model_shape(config)
    except CreditError:
        return
    try:
        with torch.device("meta"):
            model = build_model(config.model, inputs, outputs, grid)
    except (ConfigError, ValueError) as error:
        yield Finding("error", "model", str(error))
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Finding("ok", "model", f"{name}, {parameters:,} parameters, {inputs} -> {outputs} channels")
    planner = Planner(
        lambda rows: build_model(config.model, inputs, outputs, (rows, grid[1])),
        (inputs, *grid),
        config.to_dict(),
        DOMAIN_CONVERTERS,
    )
    try:
        cost = planner.cost(mesh_shape(trainer.parallelism.model_dump(), _ranks(config, ranks)))
    except USER_ERRORS as error:
        yield Finding("error", "model", str(error).splitlines()[0], "another trainer.parallelism, or see the message")
        return
    except ValueError:
        return  # said of the mesh
    yield Finding("ok", "model", f"a rank needs {cost.memory / 1e9:.3f} GB; see credit plan for other meshes")


def _run(config: Config) -> Iterator[Finding]:
    try:
        refuse_missing_tensorboard(config.trainer.tensorboard)
    except ConfigError as error:
        yield _from_message(str(error))
    place = next(one for one in (config.run, *config.run.absolute().parents) if one.exists())
    if not os.access(place, os.W_OK):
        yield Finding("error", "run", f"{config.run} cannot be written", "another directory")
        return
    found = list_checkpoints(config.run / "checkpoints")
    line, _ = read_status(config.run)
    yield Finding("ok", "run", f"{line}; {len(found)} checkpoints" if found else f"{config.run}: starts from scratch")
