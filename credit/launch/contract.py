"""The sampler contract, enforced: samples are divided over dp only, and tp and domain peers get the same batch.

A sampler fed with the global rank, or seeded by it, trains on wrong batches without any sign of it: peers would join
the rows of different samples. So before the first step every rank tells what it will draw, one batch's checksum
is compared, and while training it is compared again every few steps.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from credit.config.parallelism import Conf
from credit.domain_parallel.torch_private import default_timeout, tree_leaves
from credit.errors import LaunchError
from credit.layout import MeshShape, mesh_coords, mesh_shape, parse_parallelism_conf
from credit.parallel.collectives import gather_objects

FIX = (
    "build it with dp_rank, dp_size = data_parallel_coords(conf): rank=dp_rank, num_replicas=dp_size, one seed for all"
)
_END = object()
"""What stands for the batch after the last."""
_MOST = 2**63 - 1
"""The largest checksum."""


class _Pass(NamedTuple):
    """What a rank says of its coming pass over the data."""

    host: str
    draws: int
    digest: str
    as_a_set: str
    dataset: int
    batch: int


class CheckedLoader:
    """The batches of `loader`, the first and every `every`-th compared across the ranks that work on the same samples.

    Raises:
        LaunchError: while iterating, on all ranks of a replica whose batches differ.
    """

    def __init__(self, loader: Iterable[Any], shape: MeshShape, whole: Sequence[str] | None, every: int) -> None:
        self.loader, self.shape, self.whole, self.every = loader, shape, whole, every

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for number in count():
            batch, error = _END, None
            try:
                batch = next(batches, _END)
            except Exception as caught:
                error = caught
            # A rank that has read nothing takes part too: its peers would wait for it.
            if number % self.every == 0:
                self._compare(None if error is not None else checksum(batch, self.whole), number)
            if error is not None:
                raise error
            if batch is _END:
                return
            yield batch

    def _compare(self, mine: int | None, number: int) -> None:
        """Everyone tells of a pass's first batch; later ones cost one all_reduce of two integers in the replica."""
        size = self.shape.tp * self.shape.domain
        group = _replica_group(size)
        if group is None:
            return
        if number > 0:
            ends = torch.tensor([-_MOST, -_MOST] if mine is None else [mine, -mine])
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
            if ends[0] <= -ends[1]:
                return
        among = group if number > 0 else None
        said = gather_objects((dist.get_rank(), socket.gethostname(), mine), among)
        for first in range(0, len(said), size):
            peers = [one for one in said[first : first + size] if one[2] is not None]
            if len({value for *_, value in peers}) > 1:
                self._refuse(
                    [Who(rank, host, self.shape) for rank, host, _ in peers], [one[2] for one in peers], number
                )

    def _refuse(self, peers: list[Who], values: list[int], number: int) -> None:
        entries = f"entries {', '.join(self.whole)} of " if self.whole is not None else ""
        raise LaunchError(
            f"{entries}batch {number} differ between ranks that must get the same samples: "
            f"{_name_odd(peers, values)}. Is the data set listed in the same order on every host (sort it)? If each "
            f"rank reads its own rows only, name what peers share: enforce_sampler_contract(..., whole=[...])"
        )


class Who(NamedTuple):
    """A rank, for messages."""

    rank: int
    host: str
    shape: MeshShape

    def __str__(self) -> str:
        at = mesh_coords(self.shape, self.rank)
        return f"rank {self.rank} on {self.host} (dp {at.dp}, tp {at.tp}, domain {at.domain})"


def enforce_sampler_contract(
    loader: DataLoader[Any], conf: Conf, *, drawn: int = 0, whole: Sequence[str] | None = None, every: int = 50
) -> CheckedLoader:
    """Compare what all ranks will draw in the coming pass, and go on comparing. Called by all, before the first step.

    The ids that the sampler gives must be equal within a replica, disjoint between replicas, of equal count, and
    complete but for a last batch that is dropped. Costs a pass over the sampler (not over the data) and O(samples)
    numbers on the wire.

    Args:
        loader: over a map-style data set; or over an iterable one that has `sample_ids()`, the ids of the samples that
            this rank will yield in the coming pass, all workers together. Without it only batches are compared.
        conf: the whole config, see `parse_parallelism_conf`.
        drawn: samples of this pass that all replicas together have had already, where a run is resumed within it.
        whole: entries of a batch (a dictionary) that must be equal within a replica; all by default. Name them where
            each rank reads its own rows of the others.
        every: batches from one comparison to the next.

    Returns:
        What to iterate over instead of `loader`.

    Raises:
        LaunchError: on every rank, naming ranks, hosts, coordinates and the fix.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    shape = mesh_shape(parse_parallelism_conf(conf), world)
    planned = planned_samples(loader)
    if planned is not None:
        ids, draws = planned
        length = getattr(loader.dataset, "__len__", None)
        mine = _Pass(
            socket.gethostname(),
            draws,
            _digest(ids),
            _digest(np.sort(ids)),
            len(loader.dataset) if length is not None else -1,  # type: ignore[arg-type]
            _batch_size(loader),
        )
        passes = gather_objects(mine)
        people = [Who(rank, one.host, shape) for rank, one in enumerate(passes)]
        refuse_broken_contract(people, passes)
        # Peers of a replica draw the same: one of each tells.
        speaks = not dist.is_initialized() or dist.get_rank() % (shape.tp * shape.domain) == 0
        told = gather_objects(ids if speaks else None)[:: shape.tp * shape.domain]
        refuse_incomplete(told, people[:: shape.tp * shape.domain], mine.dataset, drawn, mine.batch)
    return CheckedLoader(loader, shape, whole, every)


def planned_samples(loader: DataLoader[Any]) -> tuple[np.ndarray, int] | None:
    """Ids of the samples of this rank's coming pass, in order, and the number of draws.

    Fillers, draws of weight 0 (see `credit.data.sampler`), are not among the ids. No random generator moves. None if an
    iterable data set does not tell.
    """
    if isinstance(loader.dataset, IterableDataset):
        tell = getattr(loader.dataset, "sample_ids", None)
        told = None if tell is None else np.fromiter(tell(), dtype=np.int64)
        return None if told is None else (told, len(told))
    with _generators_kept(loader):
        draws = tree_leaves(list(loader.batch_sampler or loader.sampler), is_leaf=lambda x: hasattr(x, "weight"))
    ids = [getattr(draw, "sample", draw) for draw in draws if getattr(draw, "weight", 1)]
    return np.array(ids, dtype=np.int64), len(draws)


@contextmanager
def _generators_kept(loader: DataLoader[Any]) -> Iterator[None]:
    """Samplers draw from generators of their own, or from torch's."""
    holders = (loader, loader.batch_sampler, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    own = [getattr(holder, "generator", None) for holder in holders]
    states = [(one, one.get_state()) for one in own if isinstance(one, torch.Generator)]
    with torch.random.fork_rng(devices=[]):
        yield
    for generator, state in states:
        generator.set_state(state)


def _batch_size(loader: DataLoader[Any]) -> int:
    sampler = loader.batch_sampler
    return loader.batch_size or getattr(sampler, "share", None) or getattr(sampler, "batch_size", None) or 1


def refuse_broken_contract(people: Sequence[Who], passes: Sequence[_Pass]) -> None:
    """Raise a LaunchError if the passes of a replica's ranks differ, or the counts of any two ranks. O(ranks)."""
    shape = people[0].shape
    replica = shape.tp * shape.domain
    if len({one.dataset for one in passes}) > 1:
        lines = _name_odd(people, [one.dataset for one in passes])
        raise LaunchError(
            f"the data set has not as many samples on all ranks: {lines}. Do all hosts see the same files?"
        )
    for first in range(0, len(passes), replica):
        peers, theirs = people[first : first + replica], passes[first : first + replica]
        if len({one.digest for one in theirs}) == 1:
            continue
        same_set = len({one.as_a_set for one in theirs}) == 1
        why = (
            "in another order: the shuffle is seeded by rank" if same_set else "other ones: it is built by global rank"
        )
        raise LaunchError(
            f"the sampler breaks the contract: ranks that work on the same samples would draw {why}, or seeded apart. "
            f"{_name_odd(peers, [one.digest for one in theirs])}. Fix: {FIX}"
        )
    if len({one.draws for one in passes}) > 1:
        lines = _name_odd(people, [one.draws for one in passes])
        raise LaunchError(
            f"the ranks would draw different numbers of samples, and some would wait: {lines}. Fix: {FIX}"
        )


def refuse_incomplete(told: Sequence[np.ndarray], people: Sequence[Who], dataset: int, drawn: int, batch: int) -> None:
    """Raise a LaunchError if replicas share samples, or leave out more than a last batch. O(samples)."""
    ids = np.concatenate(told)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        twice = unique[counts > 1]
        owners = [who for who, theirs in zip(people, told, strict=True) if (theirs == twice[0]).any()]
        raise LaunchError(
            f"the sampler breaks the contract: {len(twice)} samples would be drawn more than once, such as "
            f"{twice[0]} by {' and '.join(map(str, owners))}. Fix: {FIX}; torch's DistributedSampler repeats samples "
            f"to make shares even unless it is given drop_last=True"
        )
    missing = dataset - drawn - len(unique)
    if dataset >= 0 and not 0 <= missing < max(batch * len(told), 1):
        raise LaunchError(
            f"the sampler breaks the contract: of {dataset} samples {len(unique)} would be drawn in this pass, and "
            f"{drawn} have been: {missing} are left out, more than a last batch of {batch} x {len(told)} replicas "
            f"(ranks {', '.join(str(who.rank) for who in people[:4])} draw them). Fix: {FIX}"
        )


def checksum(batch: Any, whole: Sequence[str] | None) -> int:
    """Of the tensors, numbers and texts in a batch, or of its entries named `whole`: 63 bits; 0 at the end."""
    if batch is _END:
        return 0
    digest = hashlib.blake2b(digest_size=8)
    for leaf in tree_leaves([batch[name] for name in whole] if whole is not None else batch):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu().contiguous()
            digest.update(
                f"{leaf.dtype}{tuple(leaf.shape)}".encode() + leaf.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        else:
            digest.update(repr(leaf).encode())
    return int.from_bytes(digest.digest(), "big") >> 1


@cache
def _replica_group(size: int) -> dist.ProcessGroup | None:
    """The ranks of this rank's replica, which are consecutive. Made once, by all ranks."""
    if size == 1 or not dist.is_initialized():
        return None
    # A new group would wait half an hour, whatever the world's timeout.
    return dist.new_subgroups(group_size=size, timeout=default_timeout(), backend="gloo")[0]


def _name_odd(people: Sequence[Who], values: Sequence[Any]) -> str:
    """One rank of each value."""
    first: dict[Any, Who] = {}
    for who, value in zip(people, values, strict=True):
        first.setdefault(value, who)
    listed = [f"{who} has {value}" for value, who in list(first.items())[:4]]
    return "; ".join(listed) + ("; ..." if len(first) > 4 else "")


def _digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=6).hexdigest()
