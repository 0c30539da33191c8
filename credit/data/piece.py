"""One store of those that make up a data set: under one set of names, read by latitude rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from credit.data.grid import Grid
from credit.data.opening import GRIB, AbsentChunk, chunk_of, open_dataset
from credit.data.shared import SharedReads
from credit.data.times import read_times, when
from credit.errors import DataError

AXES = {
    "latitude": ("latitude", "degrees_north", ("latitude", "lat")),
    "longitude": ("longitude", "degrees_east", ("longitude", "lon")),
    "time": ("time", "", ("valid_time", "time")),
    "level": ("air_pressure", "", ("level", "pressure_level", "isobaricInhPa", "plev", "lev", "pressure")),
}
"""Of each axis its CF standard name and units, and the names that stores in the field use for it."""

NO_FIELD = 9e36
"""netCDF's fill value of floats is 9.97e36, and is not always declared."""


class Piece:
    """A zarr store or netCDF file of global fields.

    Args:
        path: or address.
        missing: what to take in place of missing values of some variables: a number, or NaN where it says mask.
        region: of a part of the globe.
        monthly: of one state a month; None: if it looks like that.
        names: what variables are called here, by their names in the store; it need not have all of them.

    Attributes:
        path: where it is.
        grid: the latitude-longitude grid.
        times: see `read_times`; None if it has no time.
        notes: what was taken otherwise than it stands in the store, in words.
        names: as given.
        variables: names of all, with their axes.
        shared: with the ranks of this node that read the same but for the rows, if there are any.

    Raises:
        DataError: if the store is missing, cannot be opened, or has no such axes.
    """

    def __init__(
        self,
        path: str,
        missing: Mapping[str, Any] | None = None,
        region: bool = False,
        monthly: bool | None = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self._missing, self.names = path, missing or {}, names or {}
        self.shared: SharedReads | None = None
        dataset = self.dataset
        try:
            self.grid = Grid(dataset.latitude.values, dataset.longitude.values, region)
            self.times: np.ndarray | None = None
            self.notes: list[str] = []
            if "time" in dataset.dims:
                self.times, self.notes = read_times(dataset, monthly)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None
        self.variables = {
            str(name): tuple("level" if dim in self.level_axes else str(dim) for dim in array.dims)
            for name, array in dataset.data_vars.items()
        }

    @cached_property
    def dataset(self) -> xr.Dataset:
        """Opened at the first use, under the names of `AXES`."""
        stored = {ours: name for name, ours in self.names.items()}
        dataset = open_dataset(self.path, {stored.get(name, name): how for name, how in self._missing.items()})
        dataset = self._called_ours(dataset)
        for axis in AXES:
            dataset = _with_axis(dataset, axis, self.path)
        return dataset

    def _called_ours(self, dataset: xr.Dataset) -> xr.Dataset:
        names = {name: ours for name, ours in self.names.items() if name in dataset.data_vars}
        taken = [ours for ours in names.values() if ours in dataset.variables and ours not in names]
        if taken:
            theirs = next(name for name, ours in names.items() if ours == taken[0])
            raise DataError(f"{self.path} has {theirs}, to be called {taken[0]}, and {taken[0]}: name it otherwise")
        return dataset.rename(names)

    @property
    def stored_names(self) -> list[str]:
        """Of the variables, in the store."""
        stored = {ours: name for name, ours in self.names.items()}
        return [stored.get(name, name) for name in self.variables]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: whoever gets this opens them again, at the first read."""
        return {name: value for name, value in self.__dict__.items() if name != "dataset"}

    def attributes(self, variable: str) -> dict[str, Any]:
        """CF attributes of a variable, of Python's own types."""
        attributes = self.dataset[variable].attrs.items()
        return {str(key): one.tolist() if isinstance(one, np.generic | np.ndarray) else one for key, one in attributes}

    @cached_property
    def level_axes(self) -> list[str]:
        """Variables of one store may have different levels: the axes of them, `level` the first."""
        axes = self.dataset.coords.items()
        return [str(name) for name, axis in axes if axis.dims == (name,) and _is_level(str(name), axis)]

    def levels(self, variable: str) -> np.ndarray:
        """Of a variable that has them, as the store numbers them."""
        axis = next(dim for dim in self.dataset[variable].dims if dim in self.level_axes)
        levels = self.dataset[axis].values
        if not np.issubdtype(levels.dtype, np.number):
            raise DataError(f"{self.path}: the levels are {levels.dtype}, not numbers: {levels[:4].tolist()}")
        return levels

    def has_level(self, variable: str, level: float) -> bool:
        return bool(np.isclose(self.levels(variable), level, rtol=1e-5).any())

    def read(self, name: str, levels: Sequence[float | None], times: Sequence[int], rows: range) -> np.ndarray:
        """Fields at some times: float32, (time, level, row, longitude). Reads `rows` and no others.

        Args:
            levels: [None] for a variable without.

        Raises:
            DataError: if a chunk was never written or is damaged, or at the first value that is not finite.
        """
        field = self._one_field(name)
        index = [int(np.abs(self.levels(name) - level).argmin()) for level in levels if level is not None]
        dims = [dim for dim in ("time", "level", "latitude", "longitude") if dim in field.dims]

        def decode(rows: range) -> np.ndarray:
            places = {"time": list(times), "level": index, "latitude": slice(rows.start, rows.stop)}
            selection = field.isel({dim: place for dim, place in places.items() if dim in dims})
            return selection.transpose(*dims).values.astype(np.float32)

        try:
            if self.shared is not None and self.shared.is_worth_it(self._rows_per_chunk(name)):
                values = self.shared.read((self.path, name, index, list(times)), decode, rows)
            else:
                values = decode(rows)
        except AbsentChunk as error:
            raise DataError(self._about_chunk(name, error.key)) from None
        except Exception as error:  # whatever a damaged file does to netCDF, a codec or an object store
            raise DataError(f"{self.path}: cannot read {name}: {' '.join(str(error).split())[:400]}") from None
        values = values if "level" in dims else np.expand_dims(values, -3)
        values = values if "time" in dims else np.broadcast_to(values, (len(times), *values.shape))
        if name not in self._missing:
            self._refuse_unwritten(name, values, rows)
        bad = ~(np.abs(values) < NO_FIELD)
        if bad.any():
            if name not in self._missing:
                self._refuse_not_finite(name, values, bad, levels, times, rows)
            instead = self._missing[name]
            values = np.where(bad, np.float32(np.nan if instead == "mask" else instead), values)
        return values

    def _one_field(self, name: str) -> xr.DataArray:
        """Without axes of length 1 that are of no interest here (an ensemble's number, expver)."""
        array = self.dataset[name]
        axis = next((dim for dim in array.dims if dim in self.level_axes), "level")
        array = array if axis == "level" else array.rename({axis: "level"})
        others = [dim for dim in array.dims if dim not in AXES]
        for dim in others:
            if array.sizes[dim] > 1:
                raise DataError(
                    f"{self.path}: {name} has {array.sizes[dim]} fields along {dim}: choose one (xarray: "
                    f"dataset.isel({dim}=0)) and write that"
                )
        lacking = [dim for dim in ("latitude", "longitude") if dim not in array.dims]
        if lacking:
            raise DataError(f"{self.path}: {name} has the dimensions {array.dims}, and no {lacking[0]}")
        return array.isel(dict.fromkeys(others, 0), drop=True)

    def _rows_per_chunk(self, name: str) -> int:
        """Latitudes that are decoded at once."""
        array = self.dataset[name]
        if self.path.endswith(GRIB):
            return self.grid.shape[0]
        sizes = array.encoding.get("chunks") or array.encoding.get("chunksizes")  # neither where they lie side by side
        return 1 if sizes is None else sizes[array.dims.index("latitude")]

    def _refuse_unwritten(self, name: str, values: np.ndarray, rows: range) -> None:
        """A chunk within a shard may be absent, too: then all of it is the fill value."""
        encoding = self.dataset[name].encoding
        if "absent" not in encoding:
            return
        sizes = dict(zip(self.dataset[name].dims, encoding["chunks"], strict=True))
        filled = values == encoding["absent"]
        for axis, places, dim in ((-2, rows, "latitude"), (-1, range(values.shape[-1]), "longitude")):
            begins = [i for i, place in enumerate(places) if i == 0 or place % sizes.get(dim, len(places)) == 0]
            filled = np.logical_and.reduceat(filled, begins, axis=axis)
        if filled.any():
            raise DataError(
                f"{self.path}: {name} has a chunk within a shard that holds nothing but the fill value, "
                f"{encoding['absent']:g}: it was never written. If it is what it should be, give it in data.missing"
            )

    def _about_chunk(self, name: str, key: str) -> str:
        array = self.dataset[name]
        chunk = chunk_of(key, array.encoding, array.shape)
        where = key
        if chunk is not None:
            where = ", ".join(f"{dim} {at.start}..{at.stop - 1}" for dim, at in zip(array.dims, chunk, strict=True))
            if "time" in array.dims and self.times is not None:
                where += f" (from {when(self.times[chunk[array.dims.index('time')].start])} on)"
        return (
            f"{self.path}: {name} has a chunk that was never written, {where}, which would be read as the fill value: "
            f"write it; or, if it is all fill value, give that or mask in data.missing"
        )

    def _refuse_not_finite(
        self,
        name: str,
        values: np.ndarray,
        bad: np.ndarray,
        levels: Sequence[float | None],
        times: Sequence[int],
        rows: range,
    ) -> None:
        time, level, row, column = np.argwhere(bad)[0]
        at_level = "" if levels[level] is None else f" at level {levels[level]:g}"
        at_time = "" if self.times is None else f" at {when(self.times[times[time]])}"
        raise DataError(
            f"{self.path}: {name}{at_level} is {values[time, level, row, column]:g}{at_time}, latitude "
            f"{self.grid.latitude[rows[row]]:g}, longitude {self.grid.longitude[column]:g} ({bad.sum()} such values in "
            f"what was read): say what to take in their place in data.missing, or leave the variable out"
        )


def piece_of(path: str, missing: Mapping[str, Any] | None = None) -> Piece:
    """A piece of the globe, or else of a region.

    Raises:
        DataError: if it is neither: why it is not of the globe.
    """
    try:
        return Piece(path, missing, monthly=None)
    except DataError as error:
        try:
            return Piece(path, missing, region=True, monthly=None)
        except DataError:
            raise error from None


def _is_level(name: str, axis: xr.DataArray) -> bool:
    standard, _, names = AXES["level"]
    return name in names or axis.attrs.get("standard_name") == standard


def _with_axis(dataset: xr.Dataset, axis: str, path: str) -> xr.Dataset:
    standard, units, names = AXES[axis]
    known = {str(name): values for name, values in dataset.coords.items()}
    named = [name for name in names if name in known]
    for name, values in known.items():
        if values.attrs.get("standard_name") == standard or (units and values.attrs.get("units") == units):
            named.append(name)
    found = next((name for name in dict.fromkeys(named) if known[name].ndim == 1), None)
    if found is None:
        if axis in ("level", "time"):  # one that a field has is missed when it is read
            return dataset
        curved = next((name for name in named if known[name].ndim == 2), None)
        if curved is not None:
            raise DataError(
                f"{path}: {curved} has the dimensions {known[curved].dims}: the grid is not of latitudes and "
                f"longitudes. Regrid the store to one that is (with xesmf, or cdo remapbil)"
            )
        raise DataError(f"{path} has no {axis} coordinate along an axis; it has {', '.join(known) or 'none'}")
    (dimension,) = known[found].dims
    if dimension != found:
        dataset = dataset.swap_dims({dimension: found})
    if axis in ("latitude", "longitude") and known[found].attrs.get("units", "").startswith("radian"):
        values = np.rad2deg(dataset[found].values.astype(np.float64))
        dataset = dataset.assign_coords({found: values})
    if found == axis:
        return dataset
    # Another coordinate may have the name: a scalar `time` beside `valid_time` is when a forecast began.
    return dataset.drop_vars(axis, errors="ignore").rename({found: axis})


UNITS = {"kelvin": "K", "degrees_kelvin": "K", "celsius": "degC", "pascal": "Pa", "meters": "m", "metres": "m"}
"""Other words for units, of those that stores in the field use."""


def same_units(one: str, other: str) -> bool:
    """True unless two `units` attributes say something different: "m s**-1" and "m/s" do not, and nothing does not."""
    return not one or not other or _plain_units(one) == _plain_units(other)


def _plain_units(units: str) -> list[str]:
    """Factors with their exponents, in order of name: "kg/m^2" is ["kg", "m-2"]."""
    factors = []
    for number, part in enumerate(units.replace("**", "").replace("^", "").split("/")):
        for factor in part.replace("*", " ").replace(".", " ").split():
            factor = UNITS.get(factor.lower(), factor)
            if number:
                name = factor.rstrip("0123456789-")
                factor = f"{name}-{factor[len(name) :] or 1}"
            factors.append(factor)
    return sorted(factor for factor in factors if factor != "1")
