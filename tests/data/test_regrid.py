"""A store, or forecasts, on a coarser grid: means over area."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from credit.cli import main
from credit.data.regrid import Overlap, globe
from credit.data.store import FieldStore
from tests.stores import dataset, write_zarr


@pytest.mark.parametrize(("source", "target"), [((13, 16), (7, 8)), ((13, 16), (6, 5)), ((12, 18), (5, 7))])
@pytest.mark.parametrize("flipped", [False, True])
def test_means_are_kept_and_a_constant_is_a_constant(source, target, flipped) -> None:
    fine, coarse = globe(*source), globe(*target)
    if flipped:
        fine = type(fine)(fine.latitude[::-1], (fine.longitude + 180) % 360 - 180 if source[1] % 2 else fine.longitude)
    overlap = Overlap(fine, coarse)
    field = np.random.default_rng(0).normal(size=(3, *source))
    found = overlap.of(field)
    weights = [grid.cell_weights() for grid in (fine, coarse)]
    np.testing.assert_allclose((found * weights[1]).sum((1, 2)), (field * weights[0]).sum((1, 2)), atol=1e-6)
    np.testing.assert_allclose(overlap.of(np.full(source, 7.0)), 7, rtol=1e-6)
    north = np.broadcast_to(fine.latitude[:, None], source)
    of_rows = overlap.of(north)[:, 0]
    assert (np.diff(of_rows) < 0).all()
    field[:, :, : source[1] // 2] = np.nan
    there = np.isfinite(overlap.of(field))
    assert there.any()
    assert not there.all()


def test_a_fill_value_that_is_not_declared_is_no_value() -> None:
    """Of the second column of the coarse grid all is missing, of its neighbours some."""
    field = np.full((8, 16), 280.0)
    field[:, :5] = 9.96921e36
    found = Overlap(globe(8, 16), globe(4, 8)).of(field)
    np.testing.assert_allclose(np.delete(found, 1, axis=1), 280, rtol=1e-6)
    assert np.isnan(found[:, 1]).all()


def test_a_store_is_a_store_afterwards(tmp_path, capsys) -> None:
    data = dataset(states=4, levels=(500.0, 850.0))
    path, out = write_zarr(tmp_path / "s.zarr", data), tmp_path / "coarse.zarr"
    assert main(["data", "regrid", str(path), str(out), "--grid", "7x8"]) == 0
    store = FieldStore(out)
    assert store.grid.shape == (7, 8)
    read = store.read(store.channels(["c"], [850.0]), [3], range(7))[0, 0]
    fine = FieldStore(path)
    wanted = Overlap(fine.grid, store.grid).of(data.c.sel(level=850.0).values[3])
    np.testing.assert_array_equal(read, wanted)
    assert store.attributes("a")["units"] == "m s-1"
    for grid, said in (("7x", "write latitudes and longitudes"), ("99x8", "exists")):
        assert main(["data", "regrid", str(path), str(out), "--grid", grid]) == 2
        assert said in capsys.readouterr().err
    assert main(["data", "regrid", str(path), str(tmp_path / "fine.zarr"), "--grid", "99x8"]) == 2
    assert "has 13 x 16 points, fewer than asked for" in capsys.readouterr().err


def test_forecasts_keep_their_axes(tmp_path) -> None:
    data = dataset(states=6)
    hours = np.arange(1, 3) * np.timedelta64(6, "h")
    cast = xr.Dataset(
        {"a": (("init_time", "lead_time", "latitude", "longitude"), data.a.values[:6].reshape(3, 2, 13, 16))},
        {
            "init_time": data.time.values[:3],
            "lead_time": hours.astype("timedelta64[ns]"),
            "latitude": data.latitude,
            "longitude": data.longitude,
        },
    )
    cast.to_zarr(tmp_path / "forecast.zarr", consolidated=False)
    assert main(["data", "regrid", str(tmp_path / "forecast.zarr"), str(tmp_path / "c.zarr"), "--grid", "7x8"]) == 0
    with xr.open_zarr(tmp_path / "c.zarr", consolidated=False) as found:
        assert found.a.dims == cast.a.dims
        np.testing.assert_array_equal(found.init_time, cast.init_time)
        np.testing.assert_array_equal(found.lead_time, cast.lead_time)
        assert found.a.shape == (3, 2, 7, 8)
