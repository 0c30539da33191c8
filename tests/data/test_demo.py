"""The demo generator solves its equation (exact solutions, invariants) and writes sound CF data."""

from __future__ import annotations

import warnings

import netCDF4
import numpy as np
import pytest
import xarray as xr
import zarr

from credit.data.demo import (
    EARTH_RADIUS,
    EARTH_ROTATION,
    GFS_SAMPLE,
    TRUNCATION,
    BarotropicModel,
    SphericalHarmonics,
    clenshaw_curtis,
    demo_model,
    gfs_states,
    write_demo,
)
from credit.errors import DataError

STATES, GRID = 30, (31, 60)  # more than a shard, not a whole number of chunks


@pytest.fixture(scope="module")
def harmonics() -> SphericalHarmonics:
    return SphericalHarmonics.gaussian(TRUNCATION)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.zarr"
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr("credit.data.demo.SPINUP_DAYS", 5)  # a shorter test; the weather is on from the start
        write_demo(path, states=STATES, grid=GRID)
    return path


@pytest.fixture(scope="module")
def demo(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return xr.open_zarr(store).load()


def random_coefficients(truncation: int = TRUNCATION, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    real, imaginary = rng.standard_normal((2, truncation + 1, truncation + 1))
    coefficients = np.triu(real + 1j * imaginary)  # m <= n
    coefficients[0] = coefficients[0].real
    coefficients[0, 0] = 0
    return coefficients


def mean_square(coefficients: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Global mean of the square of a field, each degree n weighted (Parseval)."""
    power = np.abs(coefficients) ** 2
    power[1:] *= 2  # orders m and -m
    return float((power * weight).sum())


def area_rms(field: np.ndarray, latitude: np.ndarray) -> float:
    weight = np.cos(np.deg2rad(latitude))
    return float(np.sqrt((field**2).mean((0, 2)) @ weight / weight.sum()))


# --- transforms ---


@pytest.mark.parametrize("truncation", [1, 10, 21, TRUNCATION])
def test_round_trip(truncation):
    harmonics = SphericalHarmonics.gaussian(truncation)
    coefficients = random_coefficients(truncation)
    again = harmonics.analysis(harmonics.synthesis(coefficients))
    np.testing.assert_allclose(again, coefficients, rtol=0, atol=1e-10)


def test_basis_is_the_known_polynomials():
    harmonics = SphericalHarmonics.regular(3, 19, 36)
    sine, cosine = np.sin(harmonics.latitude), np.cos(harmonics.latitude)
    expected = {
        (0, 1): np.sqrt(3) * sine,
        (0, 2): np.sqrt(5) / 2 * (3 * sine**2 - 1),
        (1, 1): 2 * np.sqrt(3 / 2) * cosine,
        (2, 3): 2 * np.sqrt(105 / 8) * cosine**2 * sine,
    }
    for index, profile in expected.items():
        coefficients = np.zeros((4, 4), complex)
        coefficients[index] = 1
        np.testing.assert_allclose(harmonics.synthesis(coefficients)[:, 0], profile, atol=1e-13)


def test_wind_has_no_divergence_and_its_vorticity_is_the_vorticity(harmonics):
    vorticity = 1e-5 * random_coefficients()
    relative, u, v = harmonics.vorticity_and_wind(vorticity)
    np.testing.assert_allclose(harmonics.analysis(relative), vorticity, rtol=0, atol=1e-15)
    np.testing.assert_allclose(harmonics.curl(u, v), vorticity, rtol=0, atol=1e-15)
    np.testing.assert_allclose(harmonics.divergence(u, v), 0, atol=1e-15)


def test_wind_at_the_poles_is_the_limit():
    vorticity = 1e-5 * random_coefficients()
    latitude = np.deg2rad([90, 89.9999, -89.9999, -90])
    at = SphericalHarmonics(TRUNCATION, latitude, np.full(4, 0.5), 96)
    _, u, v = at.vorticity_and_wind(vorticity)
    size = np.abs(u).max()
    assert size > 1  # a random flow crosses the pole
    np.testing.assert_allclose(u[[0, 3]], u[[1, 2]], atol=1e-3 * size)
    np.testing.assert_allclose(v[[0, 3]], v[[1, 2]], atol=1e-3 * size)
    # One vector seen from every longitude: at the north pole, north at lon is east at lon + 90.
    np.testing.assert_allclose(v[0], np.roll(u[0], -24), atol=1e-9 * size)


def test_coarse_longitudes_are_a_subset_of_fine_ones():
    coefficients = random_coefficients()
    fine = SphericalHarmonics.regular(TRUNCATION, 31, 120).synthesis(coefficients)
    coarse = SphericalHarmonics.regular(TRUNCATION, 31, 30).synthesis(coefficients)
    np.testing.assert_allclose(coarse, fine[:, ::4], atol=1e-10)


@pytest.mark.parametrize("nlat", [2, 3, 8, 37, 60, 73])
def test_clenshaw_curtis_is_exact(nlat):
    sine = np.cos(np.pi * np.arange(nlat) / (nlat - 1))
    for power in range(nlat):
        exact = 2 / (power + 1) if power % 2 == 0 else 0
        assert clenshaw_curtis(nlat) @ sine**power == pytest.approx(exact, abs=1e-13)


# --- dynamics ---


def rossby_haurwitz(harmonics, dt: float, hours: int = 48) -> float:
    """Relative error of a (m, n) = (4, 5) wave on solid-body rotation, against Haurwitz (1940)."""
    order, degree, rotation = 4, 5, 1e-6  # rotation in rad s-1: 6 m s-1 at the equator
    vorticity = np.zeros((TRUNCATION + 1,) * 2, complex)
    vorticity[0, 1] = 2 * rotation / np.sqrt(3)
    vorticity[order, degree] = 2e-5 + 1e-5j
    speed = rotation - 2 * (EARTH_ROTATION + rotation) / (degree * (degree + 1))  # eastward
    exact = vorticity.copy()
    exact[order, degree] *= np.exp(-1j * order * speed * hours * 3600)
    model = BarotropicModel(harmonics)
    for _ in range(round(hours * 3600 / dt)):
        vorticity = model.step(vorticity, dt)
    return float(np.abs(vorticity - exact).max() / np.abs(exact[order, degree]))


def test_rossby_haurwitz_wave_moves_at_its_speed_to_fourth_order(harmonics):
    coarse, fine = rossby_haurwitz(harmonics, 7200), rossby_haurwitz(harmonics, 3600)
    assert fine < 1e-6
    assert coarse / fine == pytest.approx(16, rel=0.1)


def invariants_after_a_day(harmonics, dt: float) -> np.ndarray:
    """Relative change of energy and enstrophy of the real flow."""
    vorticity = start = gfs_states()[0][0]
    model = BarotropicModel(harmonics)
    for _ in range(round(86400 / dt)):
        vorticity = model.step(vorticity, dt)
    assert np.abs(vorticity - start).max() > 0.1 * np.abs(start).max()  # it did move
    assert vorticity[0, 1] == pytest.approx(start[0, 1], rel=1e-12)  # angular momentum
    per_degree = -harmonics.inverse_laplacian / 2, np.ones(TRUNCATION + 1)
    return np.array([mean_square(vorticity, w) / mean_square(start, w) - 1 for w in per_degree])


def test_unforced_inviscid_flow_conserves_energy_and_enstrophy(harmonics):
    """What changes is the time step's error, of order 5 for Runge-Kutta 4 and an oscillation."""
    coarse, fine = (np.abs(invariants_after_a_day(harmonics, dt)) for dt in (2700, 1350))
    assert fine[0] < 1e-6
    assert fine[1] < 1e-4
    assert (coarse / fine > 2**4.5).all()


def test_advection_conserves_energy_and_enstrophy_exactly(harmonics):
    """Without the time step's error: the tendency is orthogonal to psi and to zeta."""
    vorticity = gfs_states()[0][0]
    tendency = BarotropicModel(harmonics).advection(vorticity)
    for weight in (harmonics.inverse_laplacian, np.ones(TRUNCATION + 1)):
        product = (tendency * vorticity.conj()).real * weight
        product[1:] *= 2
        assert abs(product.sum()) < 1e-13 * np.abs(product).sum()


def test_balance_of_solid_body_rotation(harmonics):
    """u = w a cos(lat) is balanced by Phi = -(w^2 / 2 + Omega w) a^2 sin(lat)^2 + constant."""
    rotation = 6e-6
    vorticity = np.zeros((TRUNCATION + 1,) * 2, complex)
    vorticity[0, 1] = 2 * rotation / np.sqrt(3)
    geopotential = harmonics.synthesis(BarotropicModel(harmonics).balanced_geopotential(vorticity))
    factor = -(rotation**2 / 2 + EARTH_ROTATION * rotation) * EARTH_RADIUS**2
    exact = factor * (np.sin(harmonics.latitude) ** 2 - 1 / 3)
    np.testing.assert_allclose(geopotential, np.tile(exact, (geopotential.shape[1], 1)).T, atol=1e-6)


def test_balanced_height_is_close_to_the_analysed_height():
    """From the real wind alone comes the real height of the extratropics, to 10 %."""
    vorticity = gfs_states()[0]
    with netCDF4.Dataset(GFS_SAMPLE) as sample:
        height = np.asarray(sample["gh"][:], np.float64)
    output = SphericalHarmonics.regular(TRUNCATION, *height.shape[1:])
    model = demo_model(vorticity.mean(0))
    for state, analysed in zip(vorticity, height, strict=True):
        balanced = output.synthesis(model.balanced_geopotential(state)) / 9.80665
        for rows in (slice(4, 25), slice(48, 69)):  # 80 to 30 degrees north and south
            error = (balanced - analysed)[rows]
            assert error.std() < 0.1 * analysed[rows].std()


def test_the_source_holds_the_mean_state_steady():
    mean = gfs_states()[0].mean(0)
    model = demo_model(mean)
    residual = model.advection(mean) + model.source - mean / model.drag_time
    assert np.abs(residual).max() < 1e-12 * np.abs(model.source).max()


# --- the data set ---


def test_same_seed_same_bytes_other_seed_other_weather(tmp_path, monkeypatch):
    monkeypatch.setattr("credit.data.demo.SPINUP_DAYS", 1)
    for name, seed in {"first": 0, "again": 0, "other": 1}.items():
        write_demo(tmp_path / name, states=3, grid=GRID, seed=seed)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()]
    first, again = ([(tmp_path / store / file).read_bytes() for file in files] for store in ("first", "again"))
    assert first == again
    one, other = (zarr.open_group(tmp_path / store)["u500"][:] for store in ("first", "other"))
    assert np.abs(one - other).max() > 1  # m s-1


def test_cf_metadata(demo):
    assert demo.attrs["Conventions"] == "CF-1.10"
    assert "Synthetic" in demo.attrs["title"]
    assert "vorticity equation" in demo.attrs["source"]
    assert "GFS" in demo.attrs["source"]
    assert "seed 0" in demo.attrs["history"]
    assert {name: (v.attrs["standard_name"], v.attrs["units"]) for name, v in demo.items()} == {
        "u500": ("eastward_wind", "m s-1"),
        "v500": ("northward_wind", "m s-1"),
        "z500": ("geopotential_height", "m"),
    }
    assert all("long_name" in variable.attrs for variable in demo.variables.values())
    assert demo["latitude"].attrs["units"] == "degrees_north"
    assert demo["longitude"].attrs["units"] == "degrees_east"
    assert demo["time"].encoding["calendar"] == "proleptic_gregorian"
    assert demo["time"].attrs["standard_name"] == "time"


def test_coordinates_and_values(demo):
    assert dict(demo.sizes) == {"time": STATES, "latitude": GRID[0], "longitude": GRID[1]}
    np.testing.assert_allclose(demo["latitude"], np.linspace(90, -90, GRID[0]))
    np.testing.assert_allclose(demo["longitude"], np.arange(GRID[1]) * 6.0)
    assert (demo["time"].diff("time") == np.timedelta64(6, "h")).all()
    assert demo["time"].values[0] == np.datetime64("2011-01-15T00:00")
    for variable in demo.values():
        assert variable.dims == ("time", "latitude", "longitude")
        assert variable.dtype == np.float32
        assert np.isfinite(variable.values).all()


def test_it_is_weather(demo):
    latitude = demo["latitude"].values
    u, v, z = (demo[name].values for name in ("u500", "v500", "z500"))
    assert 30 < np.hypot(u, v).max() < 120
    assert 5300 < z.mean() < 5700
    assert z.min() > 4000
    assert z.max() < 6200
    zonal_mean = u.mean((0, 2))
    assert zonal_mean[(latitude > 25) & (latitude < 65)].max() > 10  # a jet in each hemisphere
    assert zonal_mean[(latitude < -25) & (latitude > -65)].max() > 10
    variability = area_rms(u - u.mean(0), latitude)
    assert 4 < variability < 12  # m s-1
    six_hours, day = (area_rms(u[lag:] - u[:-lag], latitude) / variability for lag in (1, 4))
    assert 0.15 < six_hours < 0.45 < day < 1.3


def test_layout_lets_a_rank_read_its_rows(store):
    array = zarr.open_group(store)["u500"]
    assert array.chunks == (1, 8, GRID[1])
    assert array.shards == (20, 32, GRID[1])


def test_it_is_all_or_nothing(tmp_path, store):
    def interrupt(done: int, total: int) -> None:
        assert total == 123
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "half.zarr", states=3, grid=GRID, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"demo\.zarr"):
        write_demo(store)
    assert [path.name for path in store.parent.iterdir()] == [store.name]


@pytest.mark.parametrize("wrong", [{"states": 0}, {"grid": (1, 120)}, {"grid": (61, 0)}])
def test_impossible_sizes_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="need states"):
        write_demo(tmp_path / "no.zarr", **wrong)


# --- the samples ---


def test_era5_sample():
    path = GFS_SAMPLE.with_name("era5_1deg.nc")
    with xr.open_dataset(path) as sample:
        assert dict(sample.sizes) == {"time": 24, "latitude": 181, "longitude": 360}
        assert {n: (v.attrs["standard_name"], v.attrs["units"]) for n, v in sample.items()} == {
            "msl": ("air_pressure_at_mean_sea_level", "Pa"),
            "t2m": ("air_temperature", "K"),
            "u10": ("eastward_wind", "m s-1"),
            "v10": ("northward_wind", "m s-1"),
        }
        assert sample.attrs["Conventions"].startswith("CF-")
        assert "Copernicus Climate Change Service" in sample.attrs["attribution"]
        assert "CC-BY 4.0" in sample.attrs["license"]
        assert sample["latitude"].attrs["units"] == "degrees_north"
        assert sample["longitude"].attrs["units"] == "degrees_east"
        assert set(np.diff(sample["time"].values) / np.timedelta64(1, "h")) == {7.0, 8.0}
        for variable in sample.values():
            assert variable.dtype == np.float32
            assert variable.encoding["chunksizes"] == (1, 23, 360)
            assert np.isfinite(variable.values).all()
        assert sample["msl"].min() > 92000
        assert sample["msl"].max() < 105500
        assert sample["t2m"].min() > 200
        assert sample["t2m"].max() < 320
    assert path.stat().st_size < 4.2e6


def test_gfs_sample():
    with xr.open_dataset(GFS_SAMPLE) as sample:
        assert dict(sample.sizes) == {"time": 2, "latitude": 73, "longitude": 144}
        assert {n: (v.attrs["standard_name"], v.attrs["units"]) for n, v in sample.items()} == {
            "u": ("eastward_wind", "m s-1"),
            "v": ("northward_wind", "m s-1"),
            "gh": ("geopotential_height", "m"),
        }
        assert sample["level"] == 500
        assert "public domain" in sample.attrs["license"]
        assert 5300 < sample["gh"].mean() < 5700
