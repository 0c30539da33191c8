"""How many slices: what `trainer.slices: auto` takes, and what `credit plan --slices` prints."""

from __future__ import annotations

from collections.abc import Iterator

from credit.config import Config
from credit.errors import ConfigError
from credit.launch.job import Job
from credit.models import DOMAIN_CONVERTERS, build_model
from credit.parallel.collectives import gather_objects, together
from credit.parallel.memory import free_memory
from credit.parallel.plan import Planner, SlicedCost, Work

HEADROOM = 0.9
"""Share of a device's memory that a step may take; the rest is for the libraries and fragmentation."""

MOST = 16
"""Slices that are tried."""


def planner_of(config: Config, shape: tuple[int, int, tuple[int, int]]) -> Planner:
    """Of the config's model and training.

    Args:
        shape: (channels of the input, of the output, (latitudes, longitudes)).
    """
    in_channels, out_channels, (latitudes, longitudes) = shape
    trainer = config.trainer
    return Planner(
        lambda rows: build_model(config.model, in_channels, out_channels, (rows, longitudes), config.data.is_region),
        (in_channels, latitudes, longitudes),
        trainer,
        Work(trainer.batch_size, trainer.rollout, trainer.rollout_detach, trainer.loss.ensemble),
        DOMAIN_CONVERTERS,
    )


def sliced_costs(planner: Planner, is_training: bool, replicas: int = 1) -> Iterator[SlicedCost]:
    """Of one slice, two, four and so on, each found when it is asked for."""
    number = 1
    while number <= min(MOST, planner.field[1]):
        yield planner.sliced(number, is_training, replicas)
        number *= 2


def choose_slices(job: Job, shape: tuple[int, int, tuple[int, int]], is_training: bool) -> int:
    """`trainer.slices`; for auto, the fewest whose step fits into what is free of the device of every rank.

    Args:
        shape: see `planner_of`.

    Raises:
        ConfigError: on every rank, if no number of slices fits.
    """
    given = job.config.trainer.slices
    if given != "auto":
        return given
    with together("looking at the memory"):
        free = HEADROOM * free_memory(job.device)
    free = min(gather_objects(free))
    with together("choosing the slices"):
        costs = []
        for cost in sliced_costs(planner_of(job.config, shape), is_training, job.shape.dp):
            costs.append(cost)
            if cost.memory <= free:
                job.say(f"slices: {cost.number}, {cost.memory / 1e9:.3f} GB of the {free / 1e9:.3f} GB to be had")
                return cost.number
        least = min(costs, key=lambda cost: cost.memory)
        raise ConfigError(
            f"trainer.slices: auto finds no number that fits into the {free / 1e9:.3f} GB to be had on the "
            f"{job.device.type}: {least.number} need least, {least.memory / 1e9:.3f} GB. Use trainer.accumulate or a "
            f"smaller batch, a device with more memory, or trainer.parallelism.domain on several"
        )
