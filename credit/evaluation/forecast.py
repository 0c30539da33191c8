"""Roll the trained model forward over the test period, on the mesh, into one CF zarr store."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

import credit
from credit.config import Config, InitFrom
from credit.data.dataset import Fields
from credit.data.sampler import DataParallelSampler
from credit.data.store import FieldStore
from credit.data.times import when
from credit.domain_parallel.halo_exchange import exchange
from credit.domain_parallel.partition import Partition, Window, make_plan
from credit.errors import CheckpointError, CreditError, DataError
from credit.evaluation.package import refuse_changed
from credit.files import sync_directory
from credit.launch.job import Job, sole_writer
from credit.parallel.checkpoint import Checkpointer, best_checkpoint, list_checkpoints, verify_checkpoint
from credit.parallel.collectives import gather_objects, together
from credit.parallel.weights import read_facts
from credit.steps import in_words, of_months
from credit.training.facts import OF_TRAINING, refuse_other_run, refuse_other_weights, run_facts
from credit.training.log import Progress
from credit.training.noise import Noise, of_member
from credit.training.setup import open_store, prepare_model

HOUR = np.timedelta64(1, "h")
NAMES: dict[str, dict[str, str]] = {
    "weatherbench-x": {},
    "weatherbench2": {"init_time": "time", "lead_time": "prediction_timedelta"},
}
"""Of dimensions in each `forecast.layout`, where they are not ours."""


def forecast_path(run: Path, start: np.datetime64 | None = None) -> Path:
    """Of the test period's forecasts, or of one from a start."""
    return run / ("forecast.zarr" if start is None else f"forecast-{_in_names(start)}.zarr")


def _in_names(time: np.datetime64) -> str:
    """Of files: 2026-11-27T00, or T0015 if there are minutes; of a month 2026-11."""
    whole = of_months(time) or time == time.astype("datetime64[h]")
    return when(time) if of_months(time) else np.datetime_as_string(time, "h" if whole else "m").replace(":", "")


def read_forecasts(path: Path) -> xr.Dataset:
    """A forecast store, opened, under our names of dimensions whatever its layout."""
    dataset = xr.open_zarr(path, chunks=None, consolidated=False)
    theirs = {name: own for names in NAMES.values() for own, name in names.items()}
    return dataset if "init_time" in dataset.dims else dataset.rename(theirs)


def lead_times(forecasts: xr.Dataset) -> np.ndarray:
    """timedelta64, (lead,); in months where the steps are, for which xarray has no type."""
    leads = forecasts["lead_time"]
    return leads.values.astype("timedelta64[M]") if leads.attrs.get("units") == "months" else leads.values


def valid_times(inits: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """What forecasts are of: datetime64, with the axes of both."""
    return (inits.astype("datetime64[M]") if of_months(leads) else inits) + leads


def advance(
    model: nn.Module,
    states: Sequence[Tensor],
    given: Tensor,
    unit: Tensor,
    dtype: torch.dtype,
    noise: Tensor | None = None,
) -> Tensor:
    """What is predicted one step later: normalised, float64, (start, predicted channel, local row, longitude).

    Args:
        states: normalised, float64, (start, state channel, local row, longitude); the newest first.
        given: normalised forcings and statics.
        unit: see `Fields.unit`.
        dtype: of the model.
    """
    inputs = [*(state.to(dtype) for state in states), given, *([noise] if noise is not None else [])]
    made = model(torch.cat(inputs, dim=1)).double() * unit
    channels = states[0].shape[1]
    return torch.cat([states[0] + made[:, :channels], made[:, channels:]], dim=1)


@torch.no_grad()
def roll_out(
    model: nn.Module,
    fields: Fields,
    starts: np.ndarray,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield what is predicted after each of `steps` steps: normalised, (start, channel, local row, longitude), float64.

    Args:
        noise: of a step, from 0, (start, 1, local row, longitude): for a model that was trained as an ensemble.
    """
    step = fields.config.data.step
    unit, channels, times = fields.unit.to(device, torch.float64), fields.state_channels, fields.store.times[starts]
    edge = None if fields.edge is None else fields.edge.to(device)
    with together("reading the data"):
        begin = fields.history(times)
    states = [*begin.to(device, torch.float64).unbind(1)]
    for lead in range(steps):
        with together("reading the data"):
            given = fields.given(times + lead * step)
        given = given.to(device, dtype)
        after = advance(model, states, given, unit, dtype, None if noise is None else noise(lead))
        state = after[:, :channels]
        if edge is not None:
            with together("reading the boundary"):
                truth = fields.newest(times + (lead + 1) * step)
            state = torch.where(edge, truth.to(device, torch.float64), state)
        states = [state, *states[:-1]]
        yield torch.cat([state, after[:, channels:]], dim=1)


def forecast(job: Job) -> Path:
    """Forecast from every start of the test period that `forecast.every` picks, or from `forecast.start` alone.

    Replicas take different starts, or members of an ensemble; the domain ranks of each work on one together, and each
    writes the latitudes of one chunk: no rank holds the globe.

    Returns:
        The store, in the run directory: (init_time, [number,] lead_time, [level,] latitude, longitude), where number is
        the member of an ensemble; named as `forecast.layout` says.
    """
    with sole_writer(job):
        return _forecast(job)


def _starts(config: Config, store: FieldStore) -> np.ndarray:
    """Places in the store of the times to forecast from."""
    data, start = config.data, config.forecast.start
    steps, step = config.steps, data.step
    if start is None:
        starts = store.starts(data.test, step, steps, data.gaps, data.history)
        return starts[:: config.forecast.every]
    around = range(1 - data.history, steps + 1 if data.boundary else 1)
    needed = np.array(around) * step
    whole = np.isin(store.times[:, None] + needed, store.times).all(axis=1)
    before = f" with those up to {in_words((data.history - 1) * step)} before" if data.history > 1 else ""
    before += f" and, for the boundary, up to {in_words(steps * step)} after" if data.boundary else ""
    stored = f"{store} has {len(store.times)}, from {when(store.times[0])} to {when(store.times[-1])}"
    if not whole.any():
        raise DataError(f"no state{before} is stored to start from: {stored}")
    if start == "latest":
        return np.flatnonzero(whole)[-1:]
    place = np.flatnonzero(whole & (store.times == np.datetime64(start).astype(store.times.dtype)))
    if len(place) == 0:
        raise DataError(f"no state at {start}{before} is stored (forecast.start): {stored}")
    return place


def _forecast(job: Job) -> Path:
    config = job.config
    one = config.forecast.start is not None
    store, statistics = open_store(job, analysis=one)
    with together("preparing the forecast"):
        fields = Fields(config, store, statistics, job.rows(store.grid.shape[0]), beyond=one)
        steps = config.steps
        starts = _starts(config, store)
    model, newest = _trained(job, fields, run_facts(config, statistics, store.grid))
    path = forecast_path(config.run, store.times[starts[0]] if one else None)
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
        purpose = of_member(store.times[starts[index]], member)
        noise = functools.partial(draw, [purpose]) if config.noise_channels else None
        states = roll_out(model, fields, starts[[index]], steps, job.device, dtype, noise)
        for lead, state in enumerate(states):
            if not bool(state.isfinite().all()) and broken is None:
                broken = f"{when(store.times[starts[index]])} + {in_words((lead + 1) * config.data.step)}"
            piece = chunk.of(state)
            with together("writing the forecast"):
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
            sync_directory(path.parent)
    of_members = f"{members} members, " if members > 1 else ""
    from_one = f" from {when(store.times[starts[0]])}" if one else ""
    job.say(f"{len(starts)} forecasts{from_one} of {of_members}{in_words(config.forecast.lead)} by {newest} -> {path}")
    return path


def _trained(job: Job, fields: Fields, facts: dict[str, Any]) -> tuple[nn.Module, Path]:
    """The model with the weights that the config names, and where they are from."""
    given = job.config.forecast.weights
    if given is None:
        model = prepare_model(job, fields).eval()
        return model, load_weights(job, model, facts)
    with together("reading forecast.weights"):
        refuse_changed(Path(given))
        refuse_other_weights(read_facts(Path(given)), facts)
    return prepare_model(job, fields, InitFrom(path=given)).eval(), Path(given)


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


def load_weights(job: Job, model: nn.Module, wanted: dict[str, Any]) -> Path:
    """Read the weights of the checkpoint that `forecast.checkpoint` means, averaged ones if there are; its path.

    Args:
        wanted: `run_facts` of the config.
    """
    directory, choice = job.config.run / "checkpoints", job.config.forecast.checkpoint
    with together("looking for a checkpoint"):
        found = list_checkpoints(directory)[-1:] if choice == "newest" else [best_checkpoint(directory)]
    path = gather_objects(found[0] if found else None)[0]
    with together("looking for a checkpoint"):
        if path is None:
            word = "" if choice == "newest" else "validated "
            raise CheckpointError(f"there is no {word}checkpoint in {directory}: run `credit train` first")
        if not path.exists():
            raise CheckpointError(f"{path}, the {choice} checkpoint, is missing: set forecast.checkpoint: newest")
    try:
        facts = verify_checkpoint(path)
    except CheckpointError as error:  # the one before gives other numbers
        raise CheckpointError(f"{error}. Remove it to forecast from the one before") from None
    refuse_other_run(facts, wanted, but=OF_TRAINING)
    Checkpointer(directory, model).load(path, averaged=True)
    return path


def _create(path: Path, fields: Fields, starts: np.ndarray, steps: int, checkpoint: Path, rows: int) -> None:
    """An empty store with its coordinates and attributes, in chunks of so many rows."""
    shutil.rmtree(path, ignore_errors=True)
    store, data = fields.store, fields.config.data
    coordinates, encoding = _axes_of_time(store.times[starts], np.arange(1, steps + 1) * data.step)
    coordinates |= {
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
        "title": f"Forecasts of {fields.config.model.name} every {in_words(data.step)}",
        "source": f"credit {credit.__version__}, checkpoint {checkpoint.name}, from {store.path.name}",
    }
    names = NAMES[fields.config.forecast.layout]
    encoding = {names.get(name, name): values for name, values in encoding.items()}
    empty = xr.Dataset(coords=coordinates, attrs=attributes).rename(names)
    empty.to_zarr(path, mode="w", consolidated=False, encoding=encoding)
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
            dimension_names=[names.get(dim, dim) for dim in sizes],
            attributes=store.attributes(variable),
        )


def _axes_of_time(inits: np.ndarray, leads: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Coordinates, and how they are written: in whole hours, or minutes if there are any. Of months, which have no type
    in xarray, the first days, the number of them ahead, and what they lead to."""
    hourly = of_months(leads) or not ((inits - inits.astype("datetime64[h]")).any() or (leads % HOUR).any())
    unit = "hours" if hourly else "minutes"
    since = {"units": f"{unit} since 1970-01-01", "dtype": "int64"}
    init = ("init_time", inits.astype("datetime64[ns]"), {"standard_name": "forecast_reference_time"})
    period = {"standard_name": "forecast_period"}
    if not of_months(leads):
        lead = ("lead_time", leads.astype("timedelta64[ns]"), period)
        return {"init_time": init, "lead_time": lead}, {
            "init_time": since,
            "lead_time": {"units": unit, "dtype": "int64"},
        }
    valid = valid_times(inits[:, None], leads).astype("datetime64[ns]")
    axes = {
        "init_time": init,
        "lead_time": ("lead_time", leads.astype(int), {**period, "units": "months"}),
        "valid_time": (("init_time", "lead_time"), valid, {"standard_name": "time"}),
    }
    return axes, {"init_time": since, "valid_time": since}


def _write(path: Path, fields: Fields, place: tuple[int, ...], rows: range, state: Tensor) -> None:
    """`rows` of one state, (1, channel, row, longitude), in its own units, to a place in (start, [member,] lead)."""
    names = [channel.variable for channel in fields.predicted]
    values = fields.physical(state)[0]
    if fields.mask is not None:
        values[~fields.mask[:, rows.start : rows.stop]] = np.nan
    for variable in dict.fromkeys(names):
        chosen = values[[name == variable for name in names]]
        array = zarr.open_array(path / variable, mode="r+")
        on_levels = array.ndim == len(place) + 3
        index: tuple[int | slice, ...] = (*place, *([slice(None)] if on_levels else []), slice(rows.start, rows.stop))
        array[index] = chosen if on_levels else chosen[0]
