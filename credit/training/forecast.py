"""Roll the trained model forward over the test period, on the mesh, into one CF zarr store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

import credit
from credit.data.dataset import Fields
from credit.data.sampler import DataParallelSampler
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Window, make_plan
from credit.errors import CheckpointError
from credit.launch.job import Job
from credit.parallel.checkpoint import Checkpointer, newest_good_checkpoint
from credit.parallel.collectives import together, wait_for_all
from credit.training.facts import refuse_other_run, run_facts
from credit.training.log import Progress
from credit.training.setup import open_store, prepare_model

HOUR = np.timedelta64(1, "h")


def forecast_path(run: Path) -> Path:
    return run / "forecast.zarr"


@torch.no_grad()
def roll_out(
    model: nn.Module, fields: Fields, starts: np.ndarray, steps: int, device: torch.device, dtype: torch.dtype
):
    """Yield the state after each of `steps` steps: normalised, (start, channel, local row, longitude), float64."""
    step = np.timedelta64(fields.config.data.step_hours, "h")
    increment_std = fields.increment_std.to(device, torch.float64)
    state = fields.state(starts.tolist()).to(device, torch.float64)
    for lead in range(steps):
        given = fields.given(fields.store.times[starts] + lead * step).to(device, dtype)
        change = model(torch.cat([state.to(dtype), given], dim=1))
        state = state + change.double() * increment_std
        yield state


def forecast(job: Job) -> Path:
    """Forecast from every start of the test period that `forecast.every` picks, with the newest checkpoint.

    Replicas take different starts; the domain ranks of each work on one start together, and each writes the latitudes
    of one chunk: no rank holds the globe.

    Returns:
        The store, `forecast.zarr` in the run directory: (init_time, lead_time, [level,] latitude, longitude).
    """
    config = job.config
    store, statistics = open_store(job)
    with together("preparing the forecast"):
        fields = Fields(config, store, statistics, job.rows(store.grid.shape[0]))
        steps = config.forecast.lead_hours // config.data.step_hours
        starts = store.starts(config.data.test, config.data.step_hours, steps, config.data.gaps)
        starts = starts[:: config.forecast.every]
    model = prepare_model(job, fields).eval()
    newest = load_newest(job, model)
    path = forecast_path(config.run)
    partial = path.with_name(f".{path.name}.partial")
    chunk = Chunk(store.grid.shape[0], job)
    with together("creating the forecast store"):
        if job.is_first:
            _create(partial, fields, starts, steps, newest, chunk.height)
    # One start a replica at a time: the last round is filled up, so that all replicas take as many.
    sampler = DataParallelSampler(len(starts), job.shape.dp, job.coords.dp, job.shape.dp)
    progress = Progress(len(sampler), "forecast", job.is_first)
    for ((index, weight),) in sampler:
        states = roll_out(model, fields, starts[[index]], steps, job.device, getattr(torch, config.trainer.dtype))
        for lead, state in enumerate(states):
            piece = chunk.of(state)
            if weight and job.coords.tp == 0:
                _write(partial, fields, index, lead, chunk.rows, piece)
        progress.advance()
    wait_for_all()
    with together("completing the forecast"):
        if job.is_first:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    job.say(f"{len(starts)} forecasts of {config.forecast.lead_hours} h from {newest} -> {path}")
    return path


class Chunk:
    """The latitudes that this rank writes: chunks of a zarr store are equally high, and slabs differ by a row.

    Attributes:
        height: latitudes of a chunk; the last one may have fewer.
        rows: of this rank's chunk; none where the ranks before hold all.
    """

    def __init__(self, latitudes: int, job: Job) -> None:
        parts, rank = job.shape.domain, job.coords.domain
        self.height = -(-latitudes // parts)
        self.rows = range(min(rank * self.height, latitudes), min((rank + 1) * self.height, latitudes))
        self._manager = job.manager
        # Filled up at the end, equal chunks are how the rows of a field so much higher are cut.
        filled_up = Window(after=parts * self.height - latitudes)
        self._plan = make_plan(filled_up, Partition(latitudes, parts), rank)

    def of(self, state: Tensor) -> Tensor:
        """From this rank's slab, (..., row, longitude), the rows of its chunk; fewer rows than ranks change hands."""
        return exchange(state, self._plan, -2, self._manager)[..., : len(self.rows), :]


def load_newest(job: Job, model: nn.Module) -> Path:
    """Read the weights of the newest good checkpoint of the config's run, averaged ones if there are; its path."""
    directory = job.config.run / "checkpoints"
    newest = newest_good_checkpoint(directory, job.say)
    if newest is None:
        raise CheckpointError(f"there is no checkpoint in {directory}: run `credit train` first")
    path, facts = newest
    refuse_other_run(facts, run_facts(job.config))
    Checkpointer(directory, model).load(path, averaged=True)
    return path


def _create(path: Path, fields: Fields, starts: np.ndarray, steps: int, checkpoint: Path, rows: int) -> None:
    """An empty store with its coordinates and attributes, in chunks of so many rows."""
    shutil.rmtree(path, ignore_errors=True)
    store, data = fields.store, fields.config.data
    leads = np.arange(1, steps + 1) * data.step_hours * HOUR
    coordinates = {
        "init_time": ("init_time", store.times[starts], {"standard_name": "forecast_reference_time"}),
        "lead_time": ("lead_time", leads.astype("timedelta64[ns]"), {"standard_name": "forecast_period"}),
        "latitude": ("latitude", store.grid.latitude, {"standard_name": "latitude", "units": "degrees_north"}),
        "longitude": ("longitude", store.grid.longitude, {"standard_name": "longitude", "units": "degrees_east"}),
    }
    if any(channel.level is not None for channel in fields.predicted):
        coordinates["level"] = ("level", np.array(data.levels), {"positive": "down"})
    attributes = {
        "Conventions": "CF-1.10",
        "title": f"Forecasts of {fields.config.model.name} every {data.step_hours} h",
        "source": f"credit {credit.__version__}, checkpoint {checkpoint.name}, from {store.path.name}",
    }
    hours = {"dtype": "int64", "units": "hours"}
    encoding = {"init_time": {"units": "hours since 1970-01-01", "dtype": "int64"}, "lead_time": hours}
    xr.Dataset(coords=coordinates, attrs=attributes).to_zarr(path, mode="w", consolidated=False, encoding=encoding)
    group = zarr.open_group(path, mode="r+")
    horizontal = store.grid.shape
    for variable in dict.fromkeys(channel.variable for channel in fields.predicted):
        levels = [channel.level for channel in fields.predicted if channel.variable == variable]
        middle = () if levels == [None] else (len(levels),)
        group.create_array(
            variable,
            shape=(len(starts), steps, *middle, *horizontal),
            chunks=(1, 1, *middle, rows, horizontal[1]),
            dtype="float32",
            fill_value=float("nan"),
            dimension_names=("init_time", "lead_time", *(("level",) if middle else ()), "latitude", "longitude"),
            attributes=store.attributes(variable),
        )


def _write(path: Path, fields: Fields, start: int, lead: int, rows: range, state: Tensor) -> None:
    """`rows` of one state, (1, channel, row, longitude), in its own units."""
    names = [channel.variable for channel in fields.predicted]
    values = fields.physical(state)[0]
    for variable in dict.fromkeys(names):
        chosen = values[[name == variable for name in names]]
        array = zarr.open_array(path / variable, mode="r+")
        array[start, lead, ..., rows.start : rows.stop, :] = chosen if array.ndim == 5 else chosen[0]
