"""Roll the trained model forward over the test period, on the mesh, into one CF zarr store."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

import credit
from credit.data.dataset import Fields
from credit.data.sampler import DataParallelSampler
from credit.data.statistics import Statistics
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Window, make_plan
from credit.errors import CheckpointError, CreditError
from credit.launch.job import Job, sole_writer
from credit.parallel.checkpoint import Checkpointer, newest_good_checkpoint
from credit.parallel.collectives import together
from credit.training.facts import OF_TRAINING, refuse_other_run, run_facts
from credit.training.log import Progress
from credit.training.noise import Noise
from credit.training.setup import open_store, prepare_model

HOUR = np.timedelta64(1, "h")


def forecast_path(run: Path) -> Path:
    return run / "forecast.zarr"


@torch.no_grad()
def roll_out(
    model: nn.Module,
    fields: Fields,
    starts: np.ndarray,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    noise: Callable[[int], Tensor] | None = None,
):
    """Yield the state after each of `steps` steps: normalised, (start, channel, local row, longitude), float64.

    Args:
        noise: of a step, from 0, (start, 1, local row, longitude): for a model that was trained as an ensemble.
    """
    step = np.timedelta64(fields.config.data.step_hours, "h")
    increment_std = fields.increment_std.to(device, torch.float64)
    state = fields.state(starts.tolist()).to(device, torch.float64)
    for lead in range(steps):
        given = fields.given(fields.store.times[starts] + lead * step).to(device, dtype)
        inputs = [state.to(dtype), given, *([noise(lead)] if noise is not None else [])]
        change = model(torch.cat(inputs, dim=1))
        state = state + change.double() * increment_std
        yield state


def forecast(job: Job) -> Path:
    """Forecast from every start of the test period that `forecast.every` picks, with the newest checkpoint.

    Replicas take different starts, or members of an ensemble; the domain ranks of each work on one together, and each
    writes the latitudes of one chunk: no rank holds the globe.

    Returns:
        The store, `forecast.zarr` in the run directory: (init_time, [number,] lead_time, [level,] latitude, longitude),
        where number is the member of an ensemble.
    """
    with sole_writer(job):
        return _forecast(job)


def _forecast(job: Job) -> Path:
    config = job.config
    store, statistics = open_store(job)
    with together("preparing the forecast"):
        fields = Fields(config, store, statistics, job.rows(store.grid.shape[0]))
        steps = config.forecast.lead_hours // config.data.step_hours
        starts = store.starts(config.data.test, config.data.step_hours, steps, config.data.gaps)
        starts = starts[:: config.forecast.every]
    model = prepare_model(job, fields).eval()
    newest = load_newest(job, model, statistics)
    path = forecast_path(config.run)
    partial = path.with_name(f".{path.name}.partial")
    chunk = Chunk(store.grid.shape[0], job)
    with together("creating the forecast store"):
        if job.is_first:
            _create(partial, fields, starts, steps, newest, chunk.height)
    dtype, members = getattr(torch, config.trainer.dtype), config.forecast.members
    draw = Noise(config.trainer.seed, store.grid.shape, fields.rows, job.device, dtype)
    # One member a replica at a time: the last round is filled up, so that all replicas take as many.
    sampler = DataParallelSampler(len(starts) * members, job.shape.dp, job.coords.dp, job.shape.dp)
    progress = Progress(len(sampler), "forecast", job.is_first)
    broken: str | None = None
    for ((number, weight),) in sampler:
        index, member = divmod(number, members)
        hours = int(store.times[starts[index]].astype("datetime64[h]").astype(int))
        noise = functools.partial(draw, [(hours, member)]) if config.noise_channels else None
        states = roll_out(model, fields, starts[[index]], steps, job.device, dtype, noise)
        for lead, state in enumerate(states):
            if not bool(state.isfinite().all()) and broken is None:
                broken = f"{store.times[starts[index]]} + {(lead + 1) * config.data.step_hours} h"
            piece = chunk.of(state)
            if weight and job.coords.tp == 0:
                place = (index, member, lead) if members > 1 else (index, lead)
                _write(partial, fields, place, chunk.rows, piece)
        progress.advance()
    with together("completing the forecast"):
        if broken is not None:
            raise CreditError(
                f"the forecast is not finite from {broken} on: {newest} may be of a training that diverged, or the "
                f"data hold NaN there; {partial} is what there is"
            )
    with together("completing the forecast"):
        if job.is_first:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    of_members = f"{members} members, " if members > 1 else ""
    job.say(f"{len(starts)} forecasts of {of_members}{config.forecast.lead_hours} h from {newest} -> {path}")
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
        self._group = job.manager.group
        # Filled up at the end, equal chunks are how the rows of a field so much higher are cut.
        filled_up = Window(after=parts * self.height - latitudes)
        self._plan = make_plan(filled_up, Partition(latitudes, parts), rank)

    def of(self, state: Tensor) -> Tensor:
        """From this rank's slab, (..., row, longitude), the rows of its chunk; fewer rows than ranks change hands."""
        return exchange(state, self._plan, -2, self._group)[..., : len(self.rows), :]


def load_newest(job: Job, model: nn.Module, statistics: Statistics) -> Path:
    """Read the weights of the newest good checkpoint of the config's run, averaged ones if there are; its path."""
    directory = job.config.run / "checkpoints"
    newest = newest_good_checkpoint(directory, job.say)
    if newest is None:
        raise CheckpointError(f"there is no checkpoint in {directory}: run `credit train` first")
    path, facts = newest
    refuse_other_run(facts, run_facts(job.config, statistics), but=OF_TRAINING)
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
    members = fields.config.forecast.members
    if members > 1:
        coordinates["number"] = ("number", np.arange(members), {"standard_name": "realization"})
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
    for variable in dict.fromkeys(channel.variable for channel in fields.predicted):
        levels = [channel.level for channel in fields.predicted if channel.variable == variable]
        sizes = {
            "init_time": len(starts),
            **({"number": members} if members > 1 else {}),
            "lead_time": steps,
            **({"level": len(levels)} if levels != [None] else {}),
            **dict(zip(("latitude", "longitude"), store.grid.shape, strict=True)),
        }
        parts = {"init_time": 1, "number": 1, "lead_time": 1, "latitude": rows}
        group.create_array(
            variable,
            shape=tuple(sizes.values()),
            chunks=tuple(parts.get(dim, size) for dim, size in sizes.items()),
            dtype="float32",
            fill_value=float("nan"),
            dimension_names=tuple(sizes),
            attributes=store.attributes(variable),
        )


def _write(path: Path, fields: Fields, place: tuple[int, ...], rows: range, state: Tensor) -> None:
    """`rows` of one state, (1, channel, row, longitude), in its own units, to a place in (start, [member,] lead)."""
    names = [channel.variable for channel in fields.predicted]
    values = fields.physical(state)[0]
    for variable in dict.fromkeys(names):
        chosen = values[[name == variable for name in names]]
        array = zarr.open_array(path / variable, mode="r+")
        on_levels = array.ndim == len(place) + 3
        index: tuple[int | slice, ...] = (*place, *([slice(None)] if on_levels else []), slice(rows.start, rows.stop))
        array[index] = chosen if on_levels else chosen[0]
