"""A run that is broken anywhere ends in words, and goes on to the same weights; a forecast of a changed run is none."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xarray as xr

from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.errors import CreditError
from credit.evaluation.forecast import forecast
from credit.launch.job import start_job
from tests.stores import conf, dataset, write_zarr
from tests.table import tell
from tests.training.faults import KINDS, Faults
from tests.training.runs import curve


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Iterator[Faults]:
    made = Faults(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_a_fault_is_said_within_the_bound_and_costs_no_good_checkpoint(faults, kind, request) -> None:
    begin = time.monotonic()
    fault = faults.inject(kind, random.Random(kind))
    tell(request.node, kind, "said in time, no good checkpoint lost", fault.outcome, time.monotonic() - begin)
    assert not fault.problem, fault


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict[str, Any], xr.Dataset]:
    """A run that has ended, with its statistics in the run directory, and its forecasts."""
    folder = tmp_path_factory.mktemp("finished")
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", dataset()), ema=0.9, keep=1)
    write_statistics(parse_config(raw))
    curve(raw)
    return raw, forecast_of(raw)


def forecast_of(raw: dict[str, Any]) -> xr.Dataset:
    with start_job(lambda: parse_config(raw)) as job, xr.open_zarr(forecast(job), consolidated=False) as store:
        return store.load()


@pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_with_any_byte_changed_a_forecast_is_refused_or_the_same(finished, tmp_path, number) -> None:
    raw, wanted = finished
    run = tmp_path / "run"
    shutil.copytree(raw["run"], run, ignore=shutil.ignore_patterns("forecast.zarr", ".lock"))
    raw = {**raw, "run": str(run)}
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) >= 6
    pick, ends = random.Random(number), {"refused": 0, "the same": 0}
    for _ in range(number):
        raw["forecast"] = {**raw["forecast"], "checkpoint": pick.choice(["newest", "best"])}
        file = pick.choice(files)
        kept = file.read_bytes()
        place = pick.randrange(len(kept))
        file.write_bytes(kept[:place] + bytes([kept[place] ^ pick.randrange(1, 256)]) + kept[place + 1 :])
        try:
            found = forecast_of(raw)
        except CreditError:
            ends["refused"] += 1
        else:
            ends["the same"] += 1
            for name in wanted.data_vars:
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{file.name}, byte {place}")
        file.write_bytes(kept)
    assert min(ends.values()) > 0, ends
