"""The latitude-longitude grid: areas, and the fields that follow from place and time alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from credit.errors import DataError


@dataclass(frozen=True, eq=False)
class Grid:
    """Latitudes (degrees north, monotonic) and longitudes (degrees east, regular, all the way round).

    Raises:
        DataError: if the coordinates are not that.
    """

    latitude: np.ndarray
    longitude: np.ndarray

    def __post_init__(self) -> None:
        steps = np.diff(self.latitude)
        if len(steps) == 0 or not (np.all(steps > 0) or np.all(steps < 0)) or np.abs(self.latitude).max() > 90.001:
            raise DataError(
                f"latitudes must run from pole to pole, monotonic within -90..90; got {_ends(self.latitude)}"
            )
        spacing = np.diff(self.longitude)
        around = len(self.longitude) * spacing.mean() if len(spacing) else 0.0
        if not np.allclose(spacing, spacing.mean(), atol=1e-3) or abs(around - 360) > 1e-2:
            raise DataError(
                f"longitudes must be regular and close the circle (the models are periodic in longitude); got "
                f"{_ends(self.longitude)}, which spans {around:.6g} degrees"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.latitude), len(self.longitude)

    def latitude_weights(self) -> np.ndarray:
        """Area of each row of cells over the mean area, float64, (latitude,). Their mean is 1.

        A row covers the latitudes half-way to its neighbours, the first and last up to the pole, and area is
        the difference of sines there; so a row at the pole has a small weight, not none.
        """
        north_to_south = np.deg2rad(self.latitude.astype(np.float64))
        middle = (north_to_south[1:] + north_to_south[:-1]) / 2
        pole = np.sign(north_to_south[0] - north_to_south[-1]) * np.pi / 2
        areas = np.abs(np.diff(np.sin(np.concatenate([[pole], middle, [-pole]]))))
        return areas / areas.mean()


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
    declination -23.44 degrees x cos(2 pi (day of year + 10) / 365.25), good to a degree.

    Args:
        times: datetime64, UTC.
        latitude, longitude: degrees.
    """
    day = (times - times.astype("datetime64[Y]")) / np.timedelta64(1, "D")
    hour = (times - times.astype("datetime64[D]")) / np.timedelta64(1, "h")
    declination = np.deg2rad(-23.44) * np.cos(2 * np.pi * (day + 11) / 365.25)
    latitude, longitude = np.deg2rad(latitude)[None, :, None], np.deg2rad(longitude)[None, None, :]
    declination = declination[:, None, None]
    hour_angle = (hour[:, None, None] / 12 - 1) * np.pi + longitude
    cosine = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour_angle)
    return np.maximum(cosine, 0).astype(np.float32)
