"""Samples: drawn alike by model-parallel peers, disjoint across replicas, normalised, and the same on any cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from credit.config import parse_config
from credit.data.dataset import Fields, StepDataset
from credit.data.prepare import load_fields_statistics, open_fields, write_statistics
from credit.data.sampler import DataParallelSampler, Draw
from credit.data.statistics import Statistics, origin_of
from credit.domain_parallel.partition import Partition
from credit.errors import ConfigError, DataError
from tests.stores import conf, dataset, write_zarr


@given(
    samples=st.integers(1, 60),
    share=st.integers(1, 4),
    dp=st.integers(1, 6),
    seed=st.none() | st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_replicas_divide_the_batches_of_one_replica(samples, share, dp, seed, epoch) -> None:
    batch = share * dp
    if seed is not None and samples < batch:
        return

    def drawn(rank: int, size: int) -> list[list[Draw]]:
        sampler = DataParallelSampler(samples, batch, rank, size, seed)
        sampler.start_at(epoch)
        return list(sampler)

    whole, shares = drawn(0, 1), [drawn(rank, dp) for rank in range(dp)]
    assert whole == [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    counted = [draw.sample for batch_ in whole for draw in batch_ if draw.weight]
    assert len(counted) == len(set(counted)) == (samples // batch * batch if seed is not None else samples)


@given(first=st.integers(0, 5), epoch=st.integers(0, 2))
def test_a_pass_resumed_in_the_middle_goes_on_where_it_was(first, epoch) -> None:
    sampler = DataParallelSampler(23, 4, 1, 2, seed=3)
    sampler.start_at(epoch)
    whole = list(sampler)
    sampler.start_at(epoch, first)
    assert list(sampler) == whole[first:]
    assert len(sampler) == len(whole[first:])


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = DataParallelSampler(50, 5, 0, 1, seed)
        sampler.start_at(epoch)
        orders.add(tuple(draw.sample for batch in sampler for draw in batch))
    assert len(orders) == 3


def test_a_batch_that_cannot_be_divided_or_filled_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 6 does not divide over 4 data-parallel replicas"):
        DataParallelSampler(50, 6, 0, 4)
    with pytest.raises(ConfigError, match="batch_size 8 is more than the 7 training samples"):
        DataParallelSampler(7, 8, 0, 1, seed=0)


@pytest.fixture
def config(tmp_path):
    config = parse_config(conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset())))
    write_statistics(config)
    return config


def fields_on(config, rows: range, **changes) -> Fields:
    from credit.data.prepare import load_fields_statistics

    store = open_fields(config)
    data = config.data.model_copy(update=changes)
    return Fields(config.model_copy(update={"data": data}), store, load_fields_statistics(config, store), rows)


def test_statistics_are_the_area_weighted_ones_of_the_training_period(config) -> None:
    statistics = write_statistics(config)
    store = open_fields(config)
    truth = dataset().isel(time=slice(0, 24))
    weights = store.grid.latitude_weights()[:, None] / np.prod(store.grid.shape)
    for name in ("a", "b"):
        fields = truth[name].values.astype(np.float64)
        mean = (fields * weights).sum(axis=(1, 2)).mean()
        variance = ((fields - mean) ** 2 * weights).sum(axis=(1, 2)).mean()
        increment = (np.diff(fields, axis=0) ** 2 * weights).sum(axis=(1, 2)).mean()
        assert statistics.mean[name] == pytest.approx(mean, rel=1e-12)
        assert statistics.std[name] == pytest.approx(variance**0.5, rel=1e-9)
        assert statistics.increment_std[name] == pytest.approx(increment**0.5, rel=1e-9)
    np.testing.assert_allclose(statistics.climatology[1], truth.b.values.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("in_memory", [False, True])
def test_slabs_of_a_sample_are_the_cut_of_the_whole(config, in_memory) -> None:
    draws = [Draw(3, 1.0), Draw(0, 1.0), Draw(0, 0.0)]
    whole = StepDataset(fields_on(config, range(13)), "train").__getitems__(draws)
    assert whole["x"].shape == (3, 5, 13, 16)
    for rank in range(3):
        rows = Partition(13, 3).range(rank)
        slab = StepDataset(fields_on(config, rows, in_memory=in_memory), "train").__getitems__(draws)
        for name in ("x", "y"):
            torch.testing.assert_close(slab[name], whole[name][..., rows.start : rows.stop, :], rtol=0, atol=0)
    assert whole["weight"].tolist() == [1, 1, 0]


def test_a_sample_is_the_normalised_state_and_its_change(config) -> None:
    fields = fields_on(config, range(13))
    sample = StepDataset(fields, "train").__getitems__([Draw(2, 1.0)])
    later = sample["x"][:, :2] + sample["y"][:, 0] * fields.unit
    truth = dataset()
    np.testing.assert_allclose(fields.physical(later)[0, 1], truth.b.values[3], atol=1e-4)
    np.testing.assert_allclose(fields.physical(sample["x"][:, :2])[0, 0], truth.a.values[2], atol=1e-5)


def test_statistics_that_are_missing_or_of_other_channels_are_refused(config) -> None:
    origin = origin_of(config.data, open_fields(config).grid)
    with pytest.raises(DataError, match=r"no statistics of q: run `credit data stats CONFIG`"):
        Statistics.load(config.stats_path, ["a", "q"], [], origin)
    config.stats_path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as statistics"):
        Statistics.load(config.stats_path, ["a"], [], origin)
    config.stats_path.unlink()
    with pytest.raises(DataError, match="there are no statistics at"):
        Statistics.load(config.stats_path, ["a"], [], origin)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"step": "12h"},
            r"are of data.step 6 h, not 12 h: run `credit data stats CONFIG`, or name others in data.stats",
        ),
        ({"train": ["2020-01-01", "2020-01-05"]}, "are of data.train 2020-01-01 00:00:00 to "),
        ({"gaps": "skip"}, "are of data.gaps refuse, not skip"),
    ],
)
def test_statistics_of_something_else_are_refused(config, change, said) -> None:
    raw = config.to_dict()
    other = parse_config({**raw, "data": {**raw["data"], **change}, "forecast": {"lead": "24h"}})
    with pytest.raises(DataError, match=said):
        load_fields_statistics(other, open_fields(other))


def test_statistics_of_another_grid_or_without_a_usable_number_are_refused(config) -> None:
    store = open_fields(config)
    statistics = load_fields_statistics(config, store)
    replace(statistics, origin={**statistics.origin, "grid": "of others"}).save(config.stats_path)
    with pytest.raises(DataError, match="are of grid of others, not "):
        load_fields_statistics(config, store)
    replace(statistics, std={**statistics.std, "a": float("nan")}).save(config.stats_path)
    with pytest.raises(DataError, match=r"cannot be used, std of a nan: run"):
        load_fields_statistics(config, store)


def test_the_climatology_is_found_by_name_and_place(config) -> None:
    store = open_fields(config)
    statistics = load_fields_statistics(config, store)
    names = [channel.name for channel in store.channels(config.data.predicted, config.data.levels)]
    turned = replace(statistics, climatology=statistics.climatology.isel(latitude=slice(None, None, -1)))
    places = {axis: turned.climatology[axis] + 2e-5 for axis in ("latitude", "longitude")}
    replace(turned, climatology=turned.climatology.assign_coords(places)).save(config.stats_path)
    found = load_fields_statistics(config, store)
    np.testing.assert_array_equal(
        found.climatology_of(names[::-1], store.grid), statistics.climatology_of(names, store.grid)[::-1]
    )
