"""Demo data: months of synthetic 500 hPa weather in seconds, from real winds and numpy alone.

The barotropic vorticity equation on the sphere (Charney, Fjortoft and von Neumann 1950),

    d(zeta)/dt = -div((zeta + f) V) + S - zeta / tau - hyperdiffusion,    V = k x grad(psi),

is integrated with spherical harmonics and triangular truncation. It starts from the rotational part
of a GFS wind at 500 hPa. The constant source

    S = zeta_m / tau + div((zeta_m + f) V_m)

holds the mean m of a winter and an autumn GFS flow steady. That steady state, with its jets and
planetary waves, is barotropically unstable (Simmons, Wallace and Branstator 1983): the flow
wanders around it for ever, chaotic but with no noise, so that the present wind alone decides the
next state. That is what a network has to learn.

Guaranteed: the same arguments give the same bytes on the same machine.

Arrays: coefficients c_n^m are complex (order m, degree n), T + 1 each, zero for n < m; a field is
sum_n (c_n^0 P_n^0 + 2 Re sum_m c_n^m P_n^m e^(i m lon)). Fields: (latitude, longitude), SI units.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import zarr

from credit.files import whole

EARTH_RADIUS = 6.371e6  # m
EARTH_ROTATION = 7.292e-5  # s-1
GRAVITY = 9.80665  # m s-2
DAY = 86400.0  # s

TRUNCATION = 42  # T42 resolves what a 3 degree grid shows
TIME_STEP = 4320.0  # s; Runge-Kutta 4 at T42 is stable with winds up to 100 m s-1
OUTPUT_INTERVAL = 6  # h
SPINUP_DAYS = 30  # global energy has settled
DRAG_TIME = 10 * DAY  # tau
DIFFUSION_TIME = DAY / 8  # e-folding time of the shortest wave
GFS_SAMPLE = Path(__file__).parent / "sample" / "gfs_2p5deg.nc"

START = "hours since 2011-01-15 00:00:00"
VARIABLES = {  # name: standard_name, units, long_name
    "u500": ("eastward_wind", "m s-1", "eastward wind at 500 hPa"),
    "v500": ("northward_wind", "m s-1", "northward wind at 500 hPa"),
    "z500": ("geopotential_height", "m", "geopotential height at 500 hPa"),
}
STATES_PER_SHARD = 20
ROWS_PER_CHUNK = 8

Progress = Callable[[int, int], None]  # (done, total)


def legendre(truncation: int, latitude: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Associated Legendre functions with (1/2) int P^2 d(sin lat) = 1 and no Condon-Shortley phase.

    latitude: radians, poles included. Returns P, dP/dlat and m P / cos(lat), each (m, latitude, n).
    Recurrences: DLMF 14.10; Temperton (1991), Mon. Wea. Rev. 119, 1303-1307.
    """
    size = truncation + 1
    m, n = np.arange(size)[:, None, None], np.arange(size + 1)
    epsilon = np.sqrt(np.maximum(n**2 - m**2, 0) / (4.0 * n**2 - 1))  # (m, 1, n)
    sine, cosine = np.sin(latitude), np.cos(latitude)
    sectoral = np.sqrt(np.cumprod(1 + 0.5 / np.maximum(m, 1)) / 1.5)  # P_m^m / cos(lat)^m
    # P / cos(lat), a polynomial in sin and cos for m > 0, hence finite at the poles; P for m = 0.
    over_cosine = np.zeros((size, latitude.size, size + 1))
    for degree in range(size + 1):
        below = over_cosine[:degree, :, degree - 1], over_cosine[:degree, :, degree - 2]
        ratio = epsilon[:degree, :, degree - 1], epsilon[:degree, :, degree]
        over_cosine[:degree, :, degree] = (sine * below[0] - ratio[0] * below[1]) / ratio[1]
        if degree < size:
            power = max(degree - 1, 0)
            over_cosine[degree, :, degree] = sectoral[degree] * cosine**power

    values = over_cosine[..., :-1] * cosine[:, None]
    values[0] = over_cosine[0, :, :-1]
    lower, upper = np.roll(over_cosine, 1, axis=-1)[..., :-1], over_cosine[..., 1:]
    n = n[:-1]
    slope = (n + 1) * epsilon[..., :-1] * lower - n * epsilon[..., 1:] * upper
    slope[0] = np.sqrt(n * (n + 1.0)) * values[1]
    return values, slope, m * over_cosine[..., :-1]


def clenshaw_curtis(nlat: int) -> np.ndarray:
    """Quadrature weights in sin(lat) for `nlat` equally spaced latitudes, poles included; sum 2.

    Exact for polynomials of degree nlat - 1. Waldvogel (2006), BIT 46, 195-202.
    """
    intervals = nlat - 1
    k = np.arange(1, intervals // 2 + 1)
    terms = np.where(2 * k == intervals, 1.0, 2.0) / (4.0 * k**2 - 1)
    angle = np.pi * np.arange(nlat) / intervals
    weights = (1 - np.cos(2 * np.outer(angle, k)) @ terms) * 2 / intervals
    weights[[0, -1]] /= 2
    return weights


class SphericalHarmonics:
    """Transforms between coefficients (m, n) and fields (latitude, longitude) on one grid.

    latitude: radians, north to south; weights: their quadrature weights in sin(lat), sum 2.
    """

    def __init__(self, truncation: int, latitude: np.ndarray, weights: np.ndarray, nlon: int) -> None:
        self.truncation, self.latitude, self.nlon = truncation, latitude, nlon
        n = np.arange(truncation + 1)
        self.laplacian = -n * (n + 1.0) / EARTH_RADIUS**2  # eigenvalues, m-2
        self.inverse_laplacian = np.divide(1, self.laplacian, where=n > 0, out=np.zeros(n.size))
        values, slope, zonal = legendre(truncation, latitude)
        to_wind = self.inverse_laplacian / EARTH_RADIUS
        self._values = values
        self._vorticity_and_wind = np.concatenate([values, -slope * to_wind, zonal * to_wind], 1)
        quadrature = (weights / 2)[:, None]
        self._integral = (values * quadrature).swapaxes(1, 2)
        gradient = np.concatenate([zonal * quadrature, slope * quadrature], 1) / EARTH_RADIUS
        self._divergence = gradient.swapaxes(1, 2)

    @classmethod
    def gaussian(cls, truncation: int) -> SphericalHarmonics:
        """The smallest grid on which the quadratic terms of the equation are integrated exactly."""
        nlat = (3 * truncation + 2) // 2
        nlat += nlat % 2
        sine, weights = np.polynomial.legendre.leggauss(nlat)
        return cls(truncation, np.arcsin(sine[::-1]), weights[::-1], 2 * nlat)

    @classmethod
    def regular(cls, truncation: int, nlat: int, nlon: int) -> SphericalHarmonics:
        """Equally spaced latitudes from pole to pole and longitudes from 0."""
        latitude = np.deg2rad(np.linspace(90, -90, nlat))
        return cls(truncation, latitude, clenshaw_curtis(nlat), nlon)

    def synthesis(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients (m, n) to the field (latitude, longitude)."""
        return self._to_longitudes(_apply(self._values, coefficients).T)

    def analysis(self, field: np.ndarray) -> np.ndarray:
        """Field (latitude, longitude) to coefficients (m, n)."""
        return _apply(self._integral, self._to_orders(field).T)

    def vorticity_and_wind(self, vorticity: np.ndarray) -> np.ndarray:
        """Vorticity coefficients (s-1) to (zeta, u, v) as (3, latitude, longitude), s-1 and m s-1.

        u = -(1/a) dpsi/dlat and v = (1/(a cos lat)) dpsi/dlon with laplacian(psi) = zeta; finite
        limits at the poles.
        """
        orders = _apply(self._vorticity_and_wind, vorticity).T
        orders = np.ascontiguousarray(orders).reshape(3, self.latitude.size, -1)
        orders[2] *= 1j
        return self._to_longitudes(orders)

    def divergence(self, eastward: np.ndarray, northward: np.ndarray) -> np.ndarray:
        """Coefficients of div(F) as -int F . grad(Y*), which divides by no cos(lat)."""
        orders = np.concatenate([1j * self._to_orders(eastward), -self._to_orders(northward)])
        return _apply(self._divergence, orders.T)

    def curl(self, eastward: np.ndarray, northward: np.ndarray) -> np.ndarray:
        """Coefficients of the vertical component of curl(F)."""
        return self.divergence(northward, -eastward)

    def _to_longitudes(self, orders: np.ndarray) -> np.ndarray:
        # On a coarse grid no wave is lost: evaluate at `every` times the longitudes, then thin out.
        every = -(-(2 * self.truncation + 1) // self.nlon)
        return np.fft.irfft(orders, every * self.nlon, norm="forward")[..., ::every]

    def _to_orders(self, field: np.ndarray) -> np.ndarray:
        return np.fft.rfft(field, norm="forward")[..., : self.truncation + 1]


def _apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """sum_j matrices[m, i, j] vectors[m, j], real times complex, as one real product."""
    parts = np.stack([vectors.real, vectors.imag], 1) @ matrices.swapaxes(1, 2)
    return parts[:, 0] + 1j * parts[:, 1]


class BarotropicModel:
    """The equation at the head of this module; times in s, coefficients in s-1 (source: s-2).

    The defaults are the unforced, inviscid equation, which conserves energy and enstrophy.
    """

    def __init__(
        self,
        harmonics: SphericalHarmonics,
        *,
        source: np.ndarray | float = 0.0,
        drag_time: float = np.inf,
        diffusion_time: float = np.inf,
    ) -> None:
        self.harmonics = harmonics
        self.source, self.drag_time, self.diffusion_time = source, drag_time, diffusion_time
        self.coriolis = 2 * EARTH_ROTATION * np.sin(harmonics.latitude)[:, None]

    def absolute_vorticity_and_wind(self, vorticity: np.ndarray) -> np.ndarray:
        """(zeta + f, u, v) as (3, latitude, longitude)."""
        fields = self.harmonics.vorticity_and_wind(vorticity)
        fields[0] += self.coriolis
        return fields

    def advection(self, vorticity: np.ndarray) -> np.ndarray:
        """-div((zeta + f) V), coefficients."""
        absolute, u, v = self.absolute_vorticity_and_wind(vorticity)
        return -self.harmonics.divergence(absolute * u, absolute * v)

    def step(self, vorticity: np.ndarray, dt: float) -> np.ndarray:
        """One step of Runge-Kutta 4, then implicit hyperdiffusion (laplacian^4)."""

        def tendency(zeta: np.ndarray) -> np.ndarray:
            return self.advection(zeta) + self.source - zeta / self.drag_time

        first = tendency(vorticity)
        second = tendency(vorticity + dt / 2 * first)
        third = tendency(vorticity + dt / 2 * second)
        fourth = tendency(vorticity + dt * third)
        vorticity = vorticity + dt / 6 * (first + 2 * second + 2 * third + fourth)
        laplacian = self.harmonics.laplacian
        return vorticity / (1 + dt / self.diffusion_time * (laplacian / laplacian[-1]) ** 4)

    def balanced_geopotential(self, vorticity: np.ndarray) -> np.ndarray:
        """Geopotential coefficients (m2 s-2), global mean 0, from the nonlinear balance equation.

        laplacian(Phi + |V|^2 / 2) = k . curl((zeta + f) V): the divergence equation of a flow that
        stays non-divergent (Charney 1955, Tellus 7, 22-26).
        """
        absolute, u, v = self.absolute_vorticity_and_wind(vorticity)
        head = self.harmonics.curl(absolute * u, absolute * v) * self.harmonics.inverse_laplacian
        geopotential = head - self.harmonics.analysis((u**2 + v**2) / 2)
        geopotential[0, 0] = 0
        return geopotential


def gfs_states(truncation: int = TRUNCATION) -> tuple[np.ndarray, float]:
    """Vorticity coefficients (2, m, n), s-1, of the sample's two winds and the mean height in m."""
    with netCDF4.Dataset(GFS_SAMPLE) as sample:
        u, v, height = (np.asarray(sample[name][:], np.float64) for name in ("u", "v", "gh"))
    harmonics = SphericalHarmonics.regular(truncation, *u.shape[1:])
    vorticity = np.stack([harmonics.curl(*wind) for wind in zip(u, v, strict=True)])
    return vorticity, float(harmonics.analysis(height.mean(0))[0, 0].real)


def demo_model(mean_vorticity: np.ndarray) -> BarotropicModel:
    """The model whose source holds the given vorticity (m, n) steady, hyperdiffusion aside."""
    harmonics = SphericalHarmonics.gaussian(mean_vorticity.shape[0] - 1)
    model = BarotropicModel(harmonics, drag_time=DRAG_TIME, diffusion_time=DIFFUSION_TIME)
    model.source = mean_vorticity / DRAG_TIME - model.advection(mean_vorticity)
    return model


def weather(seed: int = 0) -> Iterator[np.ndarray]:
    """Vorticity coefficients (m, n), s-1, every 6 h, without end.

    From the winter GFS state plus noise on the waves n <= 10, 2 % of the largest coefficient: after
    the spin-up, another seed is other weather.
    """
    observed, _ = gfs_states()
    model = demo_model(observed.mean(0))
    vorticity = observed[0].copy()
    noise = np.triu(np.random.default_rng(seed).standard_normal((10, 10)))  # m <= n
    vorticity[1:11, 1:11] += 0.02 * np.abs(vorticity).max() * noise
    while True:
        for _ in range(round(OUTPUT_INTERVAL * 3600 / TIME_STEP)):
            vorticity = model.step(vorticity, TIME_STEP)
        yield vorticity


def write_demo(
    path: str | os.PathLike[str],
    *,
    states: int = 600,
    grid: tuple[int, int] = (61, 120),
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write `states` 6-hourly states of synthetic 500 hPa weather to a new CF zarr (v3) at `path`.

    Variables u500, v500 (m s-1) and z500 (m): float32 (time, latitude, longitude). `grid` is
    (latitudes from 90 to -90, longitudes from 0); `seed` perturbs the initial state, nothing else
    is random. `progress(done, total)` is called every 6 h of the simulation, spin-up included. The
    store appears under its name only when it is complete; one that exists is never touched.
    """
    path = Path(path)
    if states < 1 or grid[0] < 2 or grid[1] < 1:
        raise ValueError(f"need states >= 1 and a grid of at least (2, 1): got {states}, {grid}")
    with whole(path) as unfinished:
        store = zarr.open_group(unfinished, mode="w", zarr_format=3, attributes=_attributes(seed))
        _write_coordinates(store, states, grid)
        _write_fields(store, states, grid, seed, progress)
        with warnings.catch_warnings():  # zarr warns that this is not in the v3 specification yet
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store.store)


def _write_fields(store: zarr.Group, states: int, grid: tuple[int, int], seed: int, progress: Progress | None) -> None:
    observed, mean_height = gfs_states()
    model = demo_model(observed.mean(0))
    output = SphericalHarmonics.regular(TRUNCATION, *grid)
    variables = [_create_variable(store, name, states, grid) for name in VARIABLES]
    spinup = SPINUP_DAYS * 24 // OUTPUT_INTERVAL
    block = np.empty((len(variables), min(states, STATES_PER_SHARD), *grid), np.float32)
    for interval, vorticity in zip(range(spinup + states), weather(seed), strict=False):
        state = interval - spinup
        if state >= 0:
            slot = state % STATES_PER_SHARD
            block[:2, slot] = output.vorticity_and_wind(vorticity)[1:]
            height = output.synthesis(model.balanced_geopotential(vorticity)) / GRAVITY
            block[2, slot] = mean_height + height
            if slot + 1 == STATES_PER_SHARD or state + 1 == states:
                for variable, values in zip(variables, block, strict=True):
                    variable[state - slot : state + 1] = values[: slot + 1]
        if progress is not None:
            progress(interval + 1, spinup + states)


def _create_variable(store: zarr.Group, name: str, states: int, grid: tuple[int, int]) -> zarr.Array[Any]:
    nlat, nlon = grid
    standard_name, units, long_name = VARIABLES[name]
    # Shards keep the files few; a chunk inside them, a few rows of one state, is what a rank reads.
    shard_rows = -(-nlat // ROWS_PER_CHUNK) * ROWS_PER_CHUNK
    return store.create_array(
        name,
        shape=(states, nlat, nlon),
        dtype="float32",
        chunks=(1, ROWS_PER_CHUNK, nlon),
        shards=(min(states, STATES_PER_SHARD), shard_rows, nlon),
        compressors=None,  # zstd saves a seventh of the bytes and doubles the time of writing
        fill_value=float("nan"),
        dimension_names=("time", "latitude", "longitude"),
        attributes={"standard_name": standard_name, "units": units, "long_name": long_name},
    )


def _write_coordinates(store: zarr.Group, states: int, grid: tuple[int, int]) -> None:
    nlat, nlon = grid
    coordinates: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "time": (
            np.arange(states) * OUTPUT_INTERVAL,
            {"units": START, "calendar": "proleptic_gregorian", "axis": "T"},
        ),
        "latitude": (np.linspace(90.0, -90.0, nlat), {"units": "degrees_north", "axis": "Y"}),
        "longitude": (np.arange(nlon) * 360.0 / nlon, {"units": "degrees_east", "axis": "X"}),
    }
    for name, (values, attributes) in coordinates.items():
        attributes = {"standard_name": name, "long_name": name, **attributes}
        store.create_array(name, data=values, dimension_names=(name,), attributes=attributes)


def _attributes(seed: int) -> dict[str, Any]:
    return {
        "Conventions": "CF-1.10",
        "title": "Synthetic 500 hPa weather for demonstrations: not observed, not a forecast",
        "source": f"barotropic vorticity equation, spherical harmonics T{TRUNCATION}, from "
        "the NOAA/NCEP GFS 500 hPa wind of 2011-01-15 12 UTC (public domain)",
        "history": f"credit.data.demo, seed {seed}: constant source that balances the mean of "
        "the GFS flows of 2011-01-15 12 UTC and 2011-10-11 00 UTC, "
        f"drag {DRAG_TIME / DAY:g} d, hyperdiffusion; {SPINUP_DAYS} d of spin-up left out; "
        "z500 from the nonlinear balance equation",
        "comment": "the dates only label the 6-hourly states",
    }
