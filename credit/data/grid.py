"""The latitude-longitude grid: areas, and the fields that follow from place and time alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from credit.errors import DataError
from credit.steps import of_months


@dataclass(frozen=True, eq=False)
class Grid:
    """Latitudes (degrees north, monotonic) and longitudes (degrees east, regular): of the globe, all the way round and
    from pole to pole, or of a region.

    Raises:
        DataError: if the coordinates are not that.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    region: bool = False

    def __post_init__(self) -> None:
        steps = np.diff(self.latitude.astype(np.float64))
        if len(steps) == 0 or not (np.all(steps > 0) or np.all(steps < 0)) or np.abs(self.latitude).max() > 90.001:
            raise DataError(f"latitudes must be monotonic within -90..90; got {_ends(self.latitude)}")
        if self.region:
            self._check_region()
        else:
            self._check_globe(steps)

    def _check_region(self) -> None:
        spacing = np.diff(self.longitude.astype(np.float64))
        if len(spacing) == 0 or not np.allclose(spacing, spacing.mean(), atol=1e-3) or abs(spacing.sum()) >= 360:
            odd = int(np.abs(spacing - np.median(spacing)).argmax()) if len(spacing) else 0
            jump = f", {self.longitude[odd + 1]:g} after {self.longitude[odd]:g}" if len(spacing) else ""
            raise DataError(
                f"longitudes of a region must be regular, and less than once around; got {_ends(self.longitude)}{jump}."
                f" Across a jump by 360 count on, as from -10 to 10 (xarray: dataset.assign_coords)"
            )

    def _check_globe(self, steps: np.ndarray) -> None:
        for end, step in ((self.latitude[0], steps[0]), (self.latitude[-1], steps[-1])):
            # Half a step of a grid of cells, 0.77 of Gaussian latitudes, none of a grid that has the poles.
            if 90 - abs(float(end)) > 0.9 * abs(step):
                raise DataError(
                    f"latitudes must run from pole to pole, and end {90 - abs(float(end)):g} degrees before one, with "
                    f"steps of {abs(step):g}: a part of the globe would count as all of it; if it is a part, set "
                    f"data.grid: region. Got {_ends(self.latitude)}"
                )
        spacing = np.diff(self.longitude.astype(np.float64))
        around = len(self.longitude) * spacing.mean() if len(spacing) else 0.0
        if not np.allclose(spacing, spacing.mean(), atol=1e-3) or abs(around - 360) > 1e-2:
            once_more = len(spacing) > 1 and np.isclose(around - abs(spacing.mean()), 360, atol=1e-2)
            raise DataError(
                f"longitudes must be regular and close the circle (the models are periodic in longitude); got "
                f"{_ends(self.longitude)}, which spans {around:.6g} degrees"
                + (": the last repeats the first, leave it out" if once_more else "; of a part, set data.grid: region")
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.latitude), len(self.longitude)

    def is_like(self, other: Grid) -> bool:
        """True if the places are the same, within the rounding of float32."""
        pairs = ((self.latitude, other.latitude), (self.longitude, other.longitude))
        return self.shape == other.shape and all(np.allclose(a, b, rtol=0, atol=1e-4) for a, b in pairs)

    def __str__(self) -> str:
        of = "a region, " if self.region else ""
        return f"{of}latitudes of {_ends(self.latitude)}, longitudes of {_ends(self.longitude)}"

    def row_edges(self) -> np.ndarray:
        """Degrees north of the edges of the rows of cells, float64, (latitude + 1,).

        A row covers the latitudes half-way to its neighbours; the first and last of the globe up to the pole, so that a
        row at the pole has a small area, not none; those of a region as far out as in.
        """
        latitude = self.latitude.astype(np.float64)
        middle = (latitude[1:] + latitude[:-1]) / 2
        if self.region:
            ends = np.clip([2 * latitude[0] - middle[0], 2 * latitude[-1] - middle[-1]], -90, 90)
        else:
            ends = np.sign(latitude[0] - latitude[-1]) * np.array([90.0, -90.0])
        return np.concatenate([ends[:1], middle, ends[1:]])

    def row_areas(self) -> np.ndarray:
        """Area of each row of cells on the unit sphere, float64, (latitude,): the difference of the sines of its edges,
        times the longitudes that the cells cover."""
        longitude = np.deg2rad(self.longitude.astype(np.float64))
        around = abs(longitude[-1] - longitude[0]) / (len(longitude) - 1) * len(longitude) if self.region else 2 * np.pi
        return np.abs(np.diff(np.sin(np.deg2rad(self.row_edges())))) * around

    def latitude_weights(self) -> np.ndarray:
        """`row_areas` over their mean."""
        areas = self.row_areas()
        return areas / areas.mean()

    def cell_weights(self, boundary: int = 0) -> np.ndarray:
        """Part of each cell in the area, float64, of sum 1 over the grid: (latitude, 1), the same along a row.

        Args:
            boundary: rows and columns along the edges of a region that do not count: (latitude, longitude) then.
        """
        areas = self.latitude_weights()[:, None] / (self.shape[0] * self.shape[1])
        if not boundary:
            return areas
        counted = np.where(self.at_edge(boundary), 0.0, areas)
        return counted / counted.sum()

    def at_edge(self, width: int) -> np.ndarray:
        """True in so many rows and columns along the edges: (latitude, longitude).

        Raises:
            DataError: if nothing is left between them.
        """
        if 2 * width >= min(self.shape):
            raise DataError(f"data.boundary: {width} leaves nothing of {self.shape[0]} x {self.shape[1]} points")
        edge = np.ones(self.shape, bool)
        edge[width : self.shape[0] - width, width : self.shape[1] - width] = False
        return edge


def on_grid(fields: xr.DataArray, grid: Grid) -> xr.DataArray:
    """Fields with coordinates latitude and longitude in the order of a grid.

    Nearest within rounding: a store may have its coordinates in float32.
    """
    places = {"latitude": grid.latitude, "longitude": grid.longitude}
    return fields.sel(places, method="nearest", tolerance=1e-4)


def _ends(values: np.ndarray) -> str:
    return f"{len(values)} values, " + (f"{values[0]:g} to {values[-1]:g}" if len(values) else "none")


STATIC_FIELDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sin_latitude": lambda latitude, longitude: np.sin(latitude) + 0 * longitude,
    "cos_latitude": lambda latitude, longitude: np.cos(latitude) + 0 * longitude,
    "sin_longitude": lambda latitude, longitude: np.sin(longitude) + 0 * latitude,
    "cos_longitude": lambda latitude, longitude: np.cos(longitude) + 0 * latitude,
}
"""Fields of place alone, from (latitude, 1) and (1, longitude) in radians."""

COS_ZENITH = "cos_zenith"


def cos_zenith(times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Cosine of the sun's zenith angle, 0 at night: (time, latitude, longitude), float32.

    cos z = sin(lat) sin(dec) + cos(lat) cos(dec) cos(hour angle), Hartmann, Global Physical Climatology, eq. 2.15;
    declination -23.44 degrees x cos(2 pi (day of year + 10) / 365.25), good to a degree. Of a month the mean over the
    day in its middle, from where the sun rises to where it sets (eq. 2.16).

    Args:
        times: datetime64, UTC; or months.
        latitude, longitude: degrees.
    """
    instants = middle_of(times) if of_months(times) else times
    day = (instants - instants.astype("datetime64[Y]")) / np.timedelta64(1, "D")
    declination = (np.deg2rad(-23.44) * np.cos(2 * np.pi * (day + 11) / 365.25))[:, None, None]
    latitude, longitude = np.deg2rad(latitude)[None, :, None], np.deg2rad(longitude)[None, None, :]
    lowest, range_of_day = np.sin(latitude) * np.sin(declination), np.cos(latitude) * np.cos(declination)
    if of_months(times):
        sunset = np.arccos(np.clip(-lowest / np.maximum(range_of_day, 1e-9), -1, 1))
        cosine = (sunset * lowest + np.sin(sunset) * range_of_day) / np.pi + 0 * longitude
    else:
        hour = (times - times.astype("datetime64[D]")) / np.timedelta64(1, "h")
        hour_angle = (hour[:, None, None] / 12 - 1) * np.pi + longitude
        cosine = lowest + range_of_day * np.cos(hour_angle)
    return np.maximum(cosine, 0).astype(np.float32)


def middle_of(months: np.ndarray) -> np.ndarray:
    """datetime64[s], half-way to the next month."""
    begin, end = (edge.astype("datetime64[s]") for edge in (months, months + np.timedelta64(1, "M")))
    return begin + (end - begin) // 2
