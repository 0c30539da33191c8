"""Which samples a rank draws: its data-parallel share of every batch, the same on all its tp and domain peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from credit.errors import ConfigError


class Draw(NamedTuple):
    """One sample of a batch. Weight 0 fills the last batch of a pass, so that all ranks take as many steps."""

    sample: int
    weight: float


class DataParallelSampler(Sampler[list[Draw]]):
    """Batches of draws, a pure function of (seed, epoch, batch number): nothing to store for a resume.

    The global order and the global batches do not depend on the mesh; each replica takes its slice of each batch.

    Args:
        samples: number of samples in the data set.
        batch_size: global, over all replicas.
        dp_rank, dp_size: from `credit.parallel.mesh.data_parallel_coords`, never the global rank.
        seed: of the shuffling; None keeps the order, and fills the last batch up instead of dropping it.

    Raises:
        ConfigError: if the batch does not divide over the replicas, or no batch can be filled.
    """

    def __init__(self, samples: int, batch_size: int, dp_rank: int, dp_size: int, seed: int | None = None) -> None:
        if batch_size % dp_size:
            raise ConfigError(
                f"trainer.batch_size {batch_size} does not divide over {dp_size} data-parallel replicas: "
                f"use a multiple of {dp_size}"
            )
        if seed is not None and samples < batch_size:
            raise ConfigError(f"trainer.batch_size {batch_size} is more than the {samples} training samples")
        self.samples = samples
        self.batch_size = batch_size
        self.share = batch_size // dp_size
        self.dp_rank = dp_rank
        self.seed = seed
        self._epoch, self._first = 0, 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Make the next pass the one of `epoch`, from batch number `batch` on."""
        self._epoch, self._first = epoch, batch

    @property
    def batches(self) -> int:
        """Batches of a whole pass."""
        return self.samples // self.batch_size if self.seed is not None else -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return self.batches - self._first

    def __iter__(self) -> Iterator[list[Draw]]:
        order = list(range(self.samples))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self._epoch)
            order = torch.randperm(self.samples, generator=generator).tolist()
        for batch in range(self._first, self.batches):
            draws = [Draw(sample, 1.0) for sample in order[batch * self.batch_size : (batch + 1) * self.batch_size]]
            draws += [Draw(draws[-1].sample, 0.0)] * (self.batch_size - len(draws))
            yield draws[self.dp_rank * self.share : (self.dp_rank + 1) * self.share]
