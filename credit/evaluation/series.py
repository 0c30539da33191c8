"""What a forecast says of one place, by time: a CSV file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from credit.data.grid import Grid
from credit.errors import ConfigError
from credit.evaluation.forecast import lead_times, read_forecasts, valid_times


def parse_place(text: str) -> tuple[float, float]:
    """Degrees north and east of "52.5,13.4".

    Raises:
        ConfigError: if it is no such place.
    """
    try:
        latitude, longitude = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--at {text!r} is no place: write degrees north and east, like 52.5,13.4") from None
    if not (abs(latitude) <= 90 and abs(longitude) <= 360):
        raise ConfigError(f"--at {text!r} is no place: degrees north are -90 to 90, and degrees east -360 to 360")
    return latitude, longitude


def series(path: Path, latitude: float, longitude: float) -> xr.Dataset:
    """All fields of the first forecast in a store, at the nearest point of the grid: ([number,] lead_time, [level]).

    Raises:
        ConfigError: if the place is outside a region's grid.
    """
    with read_forecasts(path) as forecasts:
        north, east = forecasts.latitude.values.astype(float), forecasts.longitude.values.astype(float)
        around = np.abs((east - longitude + 180) % 360 - 180)
        row, column = int(np.abs(north - latitude).argmin()), int(around.argmin())
        edges = Grid(north, east, region=True).row_edges()
        if not edges.min() <= latitude <= edges.max() or around[column] > abs(east[1] - east[0]) / 2 + 1e-6:
            raise ConfigError(f"--at {latitude:g},{longitude:g} is outside the grid of {path}")
        return forecasts.isel(init_time=0, latitude=row, longitude=column).load()


def write_series(path: Path, latitude: float, longitude: float) -> Path:
    """Beside the store: a line a time (and member), a column a channel."""
    at = series(path, latitude, longitude)
    channels: dict[str, xr.DataArray] = {}
    for name, field in at.data_vars.items():
        if "level" in field.dims:
            channels |= {f"{name}_{float(level):g}": field.sel(level=level, drop=True) for level in field.level}
        else:
            channels[str(name)] = field
    valid = valid_times(at.init_time.values, lead_times(at)).astype("datetime64[ns]")
    table = xr.Dataset(channels).drop_vars("valid_time", errors="ignore")
    table = table.assign_coords(lead_time=valid).rename(lead_time="valid_time")
    out = path.with_name(f"{path.stem}-at-{latitude:g},{longitude:g}.csv")
    table.drop_vars("init_time").to_dataframe().to_csv(out, float_format="%.7g", date_format="%Y-%m-%dT%H:%M")
    return out
