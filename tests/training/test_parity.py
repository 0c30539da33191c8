"""The same config and seed give the same loss curve on every mesh: 20 steps on 181 latitudes of real fields.

All latitudes, which are what is cut; of the longitudes, which are not, one in eighteen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from credit.config import parse_config
from credit.data.prepare import SAMPLES, write_statistics
from tests.stores import write_zarr
from tests.training.runs import curve, on

STEPS = 20
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def conf(
    run: Path, store: Path, domain: int = 1, data: str = "none", dtype: str = "float32", **trainer: Any
) -> dict[str, Any]:
    """A narrow U-Net on the ERA5 sample: 10 training samples, 5 steps an epoch."""
    return {
        "run": str(run),
        "data": {
            "path": str(store),
            "variables": ["t2m", "u10"],
            "statics": ["sin_latitude"],
            "forcings": ["cos_zenith"],
            "step": "7h",
            "gaps": "skip",
            "train": ["2026-03-25", "2026-03-29"],
            "valid": ["2026-03-29", "2026-03-30"],
            "test": ["2026-03-31", "2026-04-01"],
            "stats": str(store.with_name("stats.nc")),
            "in_memory": True,
        },
        "model": {"name": "unet", "width": 4, "levels": 2, "groups": 2},
        "trainer": {
            "parallelism": {"data": data, "tensor": 1, "domain": domain},
            "epochs": 4,
            "batch_size": 2,
            "warmup_steps": 3,
            "clip": 0.3,
            "dtype": dtype,
            **trainer,
        },
        "forecast": {"lead": "14h"},
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    with xr.open_dataset(SAMPLES["era5-sample"]) as sample:
        fields = sample[["t2m", "u10"]].isel(longitude=slice(None, None, 18)).load().drop_encoding()
    path = write_zarr(tmp_path_factory.mktemp("era5") / "era5.zarr", fields, rows_per_chunk=23)
    write_statistics(parse_config(conf(path.parent / "run", path)))
    return path


@pytest.fixture(scope="module")
def serial(store, tmp_path_factory) -> dict[str, tuple]:
    directory = tmp_path_factory.mktemp("serial")
    return {dtype: curve(conf(directory / dtype, store, dtype=dtype)) for dtype in TOLERANCE}


@pytest.mark.parametrize(
    ("dp", "domain", "data", "dtype"),
    [
        (1, 2, "none", "float32"),
        (1, 2, "none", "float64"),
        (1, 3, "none", "float32"),
        (1, 3, "none", "float64"),
        (1, 4, "fsdp2", "float32"),
        (1, 4, "fsdp2", "float64"),
        (2, 2, "ddp", "float32"),
        (2, 2, "ddp", "float64"),
        (2, 2, "fsdp2", "float64"),
    ],
)
def test_the_loss_curve_is_that_of_one_process(worlds, store, serial, tmp_path, dp, domain, data, dtype) -> None:
    """Gradient norms too: AdamW hides a wrong factor on the gradient, norms and clipping do not."""
    losses, valid, norms = serial[dtype]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert min(norms) < 0.3 < max(norms)  # some steps are clipped, some are not
    for rank_losses, rank_valid, rank_norms in worlds(dp * domain).run(
        curve, conf(tmp_path / "run", store, domain, data, dtype)
    ):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE[dtype], abs=0)
        assert rank_valid == pytest.approx(valid, rel=TOLERANCE[dtype], abs=0)
        assert rank_norms == pytest.approx(norms, rel=10 * TOLERANCE[dtype], abs=0)


def test_bf16_trains_and_stays_near(worlds, store, tmp_path) -> None:
    wanted, *_ = curve(conf(tmp_path / "float32", store, epochs=2))
    for data in ("none", "fsdp2"):
        for losses, *_ in worlds(2).run(curve, conf(tmp_path / data, store, 2, data, precision="bf16", epochs=2)):
            assert losses == pytest.approx(wanted, rel=0.05)
            assert losses != pytest.approx(wanted, rel=1e-6)


def test_the_built_in_sample_is_prepared_by_the_first_rank(worlds, tmp_path) -> None:
    """All its longitudes, and no statistics beforehand."""
    given = conf(tmp_path / "alone", tmp_path / "none")
    given["data"].update(path="era5-sample", stats=str(tmp_path / "stats.nc"))
    given["trainer"]["epochs"] = 1
    found = worlds(2).run(curve, on(given, tmp_path / "two", "none", 2))
    assert (tmp_path / "stats.nc").exists()
    alone, *_ = curve(given)
    assert len(alone) == 5
    for losses, *_ in found:
        assert losses == pytest.approx(alone, rel=TOLERANCE["float32"], abs=0)
