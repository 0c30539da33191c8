"""The sampler contract: kept loaders pass, each way of breaking it is named on every rank."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, get_worker_info

from credit.data.sampler import DataParallelSampler, Draw
from credit.errors import CreditError, LaunchError
from credit.launch.contract import Who, _Pass, enforce_sampler_contract, refuse_broken_contract, refuse_incomplete
from credit.layout import MeshShape
from credit.parallel.mesh import data_parallel_coords
from credit.training.batches import AgreedBatches

SAMPLES = 22
CONF = {"trainer": {"parallelism": {"data": "ddp", "tensor": 1, "domain": 2}}}


class Files(Dataset):
    """Samples that lie in files, listed in some order."""

    def __init__(self, order: list[int] | None = None, samples: int = SAMPLES) -> None:
        self.files = order or list(range(samples))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = index.sample if isinstance(index, Draw) else index
        return {"x": torch.full((2,), float(self.files[index])), "row": dist.get_rank()}


class Stream(IterableDataset):
    """Every replica's share, dealt out over workers."""

    def __init__(self, rank: int, replicas: int, tells: bool = True) -> None:
        self.mine = range(rank, SAMPLES // replicas * replicas, replicas)
        if tells:
            self.sample_ids = lambda: self.mine

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        for i in self.mine[info.id :: info.num_workers] if info else self.mine:
            yield {"x": torch.full((2,), float(i)), "row": 0}


def by_sampler(make: Callable[[int, int], Any], dataset: Dataset | None = None, **more: Any) -> DataLoader:
    return DataLoader(dataset or Files(), batch_size=2, sampler=make(*data_parallel_coords(CONF)), **more)


def distributed(rank: int, replicas: int, **more: Any) -> DistributedSampler:
    return DistributedSampler(range(SAMPLES), replicas, rank, **{"drop_last": True, **more})


def ours(rank: int, replicas: int) -> DataLoader:
    sampler = DataParallelSampler(SAMPLES, 4, rank, replicas, seed=3)
    sampler.start_at(1, 2)
    return DataLoader(Files(), batch_sampler=sampler)


def filled(rank: int, replicas: int) -> DataLoader:
    return DataLoader(Files(), batch_sampler=DataParallelSampler(SAMPLES, 8, rank, replicas))


def seeded_alike(rank: int, replicas: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.SubsetRandomSampler(range(rank, SAMPLES, replicas), generator)


KEPT: dict[str, tuple[Callable[[], DataLoader], dict[str, Any]]] = {
    "torch's sampler": (lambda: by_sampler(distributed), {}),
    "torch's sampler, in its order": (lambda: by_sampler(lambda r, n: distributed(r, n, shuffle=False)), {}),
    "ours, resumed within an epoch": (lambda: ours(*data_parallel_coords(CONF)), {"drawn": 8}),
    "ours, with fillers": (lambda: filled(*data_parallel_coords(CONF)), {}),
    "with a generator": (lambda: by_sampler(seeded_alike), {}),
    "workers": (lambda: by_sampler(distributed, num_workers=1, multiprocessing_context="fork"), {}),
    "stream": (lambda: DataLoader(Stream(*data_parallel_coords(CONF)), batch_size=2), {}),
    "stream that tells nothing": (lambda: DataLoader(Stream(*data_parallel_coords(CONF), False), batch_size=2), {}),
}


def drawn(name: str) -> tuple[list[float], bool]:
    """The samples of the checked pass, and whether the unchecked one has the same."""
    make, more = KEPT[name]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have workers
    torch.manual_seed(0)
    checked = enforce_sampler_contract(make(), CONF, whole=["x"], every=2, **more)
    seen = [value for batch in checked for value in batch["x"][:, 0].tolist()]
    torch.manual_seed(0)
    return seen, seen == [value for batch in make() for value in batch["x"][:, 0].tolist()]


@pytest.mark.parametrize("name", KEPT)
def test_a_loader_that_keeps_the_contract_gives_its_batches(worlds, name: str) -> None:
    a, b, c, d = worlds(4).run(drawn, name)
    assert a == b
    assert c == d
    assert not set(a[0]) & set(c[0]) or name == "ours, with fillers"
    assert all(same for _, same in (a, b, c, d))
    assert (
        len(a[0]) == len(c[0]) == {"ours, resumed within an epoch": 6, "ours, with fillers": 12}.get(name, SAMPLES // 2)
    )


def rank_of() -> int:
    return dist.get_rank()


def shuffled_files() -> list[int]:
    order = list(range(SAMPLES))
    if rank_of() == 1:
        random.Random(0).shuffle(order)
    return order


BROKEN: dict[str, tuple[Callable[[], DataLoader], str]] = {
    "global rank": (
        lambda: by_sampler(lambda r, n: distributed(rank_of(), dist.get_world_size())),
        "would draw other ones: it is built by global rank",
    ),
    "a seed per rank": (
        lambda: by_sampler(lambda r, n: distributed(r, n, seed=rank_of())),
        "ranks that work on the same samples would draw",
    ),
    "a generator per rank": (
        lambda: by_sampler(lambda r, n: RandomSampler(Files(), generator=torch.Generator().manual_seed(rank_of()))),
        "in another order: the shuffle is seeded by rank",
    ),
    "another order on one host": (
        lambda: by_sampler(distributed, Files(shuffled_files())),
        "entries x of batch 0 differ between ranks that must get the same samples",
    ),
    "unequal length": (
        lambda: by_sampler(lambda r, n: range(r, SAMPLES - 2 * r, n)),
        "different numbers of samples, and some would wait",
    ),
    "a smaller data set on one host": (
        lambda: by_sampler(distributed, Files(samples=SAMPLES - (rank_of() == 3))),
        "the data set has not as many samples on all ranks",
    ),
    "replicas draw the same": (
        lambda: by_sampler(lambda r, n: distributed(0, 1)),
        f"{SAMPLES} samples would be drawn more than once, such as 0 by rank 0",
    ),
    "replicas seeded apart": (
        lambda: by_sampler(lambda r, n: distributed(r, n, seed=r)),
        "samples would be drawn more than once",
    ),
    "a repeated sample": (
        lambda: by_sampler(
            lambda r, n: DistributedSampler(range(SAMPLES - 1), n, r, shuffle=False), Files(samples=SAMPLES - 1)
        ),
        "1 samples would be drawn more than once, such as 0 by rank 0",
    ),
    "half of the data": (
        lambda: by_sampler(lambda r, n: range(r, SAMPLES // 2, n) if r else range(0, SAMPLES // 2 - 1, n)),
        "of 22 samples 10 would be drawn",
    ),
}


def broken(name: str) -> tuple[str, float]:
    begin = time.perf_counter()
    with pytest.raises(LaunchError) as caught:
        for _ in enforce_sampler_contract(BROKEN[name][0](), CONF, whole=["x"]):
            pass
    return str(caught.value), time.perf_counter() - begin


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_named_on_every_rank(worlds, name: str) -> None:
    said = worlds(4).run(broken, name)
    for message, seconds in said:
        assert BROKEN[name][1] in message
        assert "(dp 0, tp 0, domain " in message or "(ranks 0, 2 draw them)" in message
        assert (
            "Fix: build it with dp_rank" in message or "same order on every host" in message or "same files" in message
        )
        assert seconds < 5


class Unreadable(Files):
    """A file that one rank cannot read."""

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if dist.get_rank() == 1 and index in self.bad:
            raise OSError(f"no sample {index}")
        return super().__getitem__(index)


def read_until_it_fails(bad: int) -> tuple[int, str]:
    dataset = Unreadable()
    dataset.bad = range(4 * bad, 4 * bad + 4)
    loader = by_sampler(lambda r, n: distributed(r, n, shuffle=False), dataset)
    batches, seen = AgreedBatches(enforce_sampler_contract(loader, CONF, whole=["x"], every=2)), 0
    with pytest.raises(CreditError) as caught:  # noqa: PT012
        for _ in batches:
            seen += 1
            batches.agree()
    return seen, str(caught.value)


@pytest.mark.parametrize("bad", [0, 1, 2, 4], ids=["told to all", "not compared", "compared", "compared again"])
def test_a_batch_that_one_rank_cannot_read_stops_all(worlds, bad: int) -> None:
    """Comparing batches is a collective: the rank that has nothing to compare takes part."""
    for seen, message in worlds(4).run(read_until_it_fails, bad):
        assert seen == bad
        assert message.startswith(f"reading a batch failed on rank 1: OSError: no sample {4 * bad} (")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 30),
    st.data(),
)
def test_any_change_of_a_pass_is_found(dp: int, replica: int, share: int, data: Any) -> None:
    """Of a layout that keeps the contract, one rank's order, one id, or one count is changed."""
    shape = MeshShape(dp, 1, replica)
    people = [Who(rank, "h", shape) for rank in range(dp * replica)]
    order = np.random.default_rng(share).permutation(dp * share)
    told = [order[r::dp] for r in range(dp)]

    def passes(ids: list[np.ndarray]) -> list[_Pass]:
        return [_Pass("h", len(i), i.tobytes().hex(), np.sort(i).tobytes().hex(), dp * share, 1) for i in ids]

    every = [told[rank // replica] for rank in range(dp * replica)]
    refuse_broken_contract(people, passes(every))
    refuse_incomplete(told, people[::replica], dp * share, 0, 1)
    changed = data.draw(st.integers(0, dp * replica - 1))
    if replica > 1 and share > 1:
        other = [np.roll(ids, rank == changed) for rank, ids in enumerate(every)]
        with pytest.raises(LaunchError, match=f"rank {changed} " if changed % replica else "rank "):
            refuse_broken_contract(people, passes(other))
    if dp > 1:
        twice = [ids.copy() for ids in told]
        twice[0][0] = twice[1][0]
        with pytest.raises(LaunchError, match="more than once"):
            refuse_incomplete(twice, people[::replica], dp * share, 0, 1)
        with pytest.raises(LaunchError, match="left out"):
            refuse_incomplete(told[1:], people[replica::replica], dp * share + dp, 0, 1)
