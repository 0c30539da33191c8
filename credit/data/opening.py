"""Where stores are, and how they are opened: files, directories, zips, object stores."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore, ZipStore

from credit.container import binding_hint
from credit.errors import DataError

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
"""Names of what is in a zarr store beside chunks."""
PRESSURE = "isobaricInhPa"
"""What cfgrib calls the axis of pressure levels."""
GRIB = (".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2")
REFERENCES = (".json", ".parq", ".parquet")
"""Of kerchunk: where in other files the chunks of a zarr store are."""
RETRY_S = 120
"""How long requests to an object store are tried again, with growing pauses."""


class AbsentChunk(Exception):
    """A chunk that was never written: zarr would read it as the fill value.

    Attributes:
        key: of the chunk, such as "t/c/0/1/0".
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Written(WrapperStore[Store]):
    """A store whose chunks must have been written, once it has been opened: an axis may be all fill.

    Args:
        strict: once opened, the arrays that may have absent chunks; shared with copies that zarr makes.
    """

    def __init__(self, store: Store, strict: list[set[str]] | None = None) -> None:
        super().__init__(store)
        self.strict = [] if strict is None else strict

    def _with_store(self, store: Store) -> Written:
        return Written(store, self.strict)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await self._store.get(key, prototype, byte_range)
        may_be_absent = not self.strict or key.rpartition("/")[2] in METADATA or key.partition("/")[0] in self.strict[0]
        if found is None and not may_be_absent:
            raise AbsentChunk(key)
        return found


def expand(paths: Sequence[str]) -> list[str]:
    """Each path, patterns (`*`, `?`, `[`) as the files that they match, in order of name.

    Raises:
        DataError: if a pattern matches nothing.
    """
    found: list[str] = []
    for path in paths:
        if is_remote(path) or Path(path).exists() or not glob.has_magic(path):
            found.append(path)
            continue
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise DataError(f"nothing matches {path} (data.path, relative to {Path.cwd()}){binding_hint(Path(path))}")
        found += matches
    return found


def is_remote(path: str) -> bool:
    return "://" in path


def open_dataset(path: str, missing: Mapping[str, Any]) -> xr.Dataset:
    """A zarr store (a directory, a .zip, an address, an icechunk repository, references of kerchunk), a netCDF or a
    GRIB file; nothing is read but metadata and coordinates.

    Args:
        missing: variables of which values may be missing, see `credit.config.Data`: so may chunks that are all fill.

    Raises:
        DataError: if it is missing or cannot be opened.
    """
    if not is_remote(path) and not Path(path).exists():
        raise DataError(f"there is no {path} (data.path, relative to {Path.cwd()}){binding_hint(Path(path))}")
    kind = "netCDF file"
    try:
        if path.endswith(REFERENCES):
            kind = "kerchunk reference"
            return _open_zarr(_references(path), False, missing)
        if is_remote(path):
            kind = "zarr store"
            return _open_zarr(_object_store(path), None, missing)
        if path.endswith(GRIB):
            kind = "GRIB file"
            return _open_grib(path)
        if (Path(path) / "snapshots").is_dir() and not any((Path(path) / name).exists() for name in METADATA):
            kind = "icechunk repository"
            return _open_zarr(_icechunk(path), False, missing)
        if Path(path).is_dir() or path.endswith(".zip"):
            kind = "zarr store"
            local = ZipStore(path, mode="r") if path.endswith(".zip") else LocalStore(path, read_only=True)
            return _open_zarr(local, False, missing)
        return xr.open_dataset(path, engine="netcdf4", cache=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be opened as a {kind}: {type(error).__name__}: {_line(error)}") from None


def _open_zarr(store: Store, consolidated: bool | None, missing: Mapping[str, Any]) -> xr.Dataset:
    written = Written(store)
    dataset = xr.open_zarr(written, chunks=None, consolidated=consolidated)
    lenient = set()
    for name in missing.keys() & dataset.data_vars.keys():
        fill = _fill_of(written, name)
        if fill != fill or fill == dataset[name].encoding.get("_FillValue") or fill == missing[name]:
            lenient.add(name)
    written.strict.append(lenient)
    for name, array in dataset.data_vars.items():
        if array.encoding.get("shards"):
            fill = _fill_of(written, str(name))
            scale, offset = (
                array.encoding.get(key, default) for key, default in (("scale_factor", 1), ("add_offset", 0))
            )
            if np.isfinite(fill):
                array.encoding["absent"] = float(fill * scale + offset)
    return dataset


def _fill_of(store: Store, name: str) -> Any:
    """What zarr takes for chunks of an array that were never written. The group knows the format: in references by
    parquet no other may be asked for."""
    array: Any = zarr.open_group(store, mode="r")[name]
    return array.fill_value


def _object_store(url: str) -> Store:
    """Credentials, region and endpoint come from the environment (AWS_*, GOOGLE_*, AZURE_*)."""
    try:
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise DataError(f"{url}: reading from object stores needs obstore: pip install 'credit-hpc[remote]'") from None
    retries: Any = {"max_retries": 10, "retry_timeout": timedelta(seconds=RETRY_S)}
    options: Any = {}
    if url.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options = {"client_options": {"allow_http": True}}
    return zarr.storage.ObjectStore(from_url(url, retry_config=retries, **options), read_only=True)


def _references(path: str) -> Store:
    """Through fsspec, with the credentials that it finds; a file that is referred to and not there is an error."""
    try:
        import fsspec

        files = fsspec.filesystem("reference", fo=path, asynchronous=True, skip_instance_cache=True)
    except ImportError as error:
        more = f"pip install 'credit-hpc[kerchunk]', and of addresses what fsspec needs: {_line(error)}"
        raise DataError(f"{path} is a kerchunk reference: {more}") from None
    return zarr.storage.FsspecStore(files, read_only=True, path="")


def _icechunk(path: str) -> Store:
    """The newest state of the branch `main`."""
    try:
        import icechunk
    except ModuleNotFoundError:
        raise DataError(f"{path} is an icechunk repository: pip install 'credit-hpc[icechunk]'") from None
    return icechunk.Repository.open(icechunk.local_filesystem_storage(path)).readonly_session("main").store


def _open_grib(path: str) -> xr.Dataset:
    """All messages. A name that is on several kinds of levels has the kind's beside it, but on pressure levels; and if
    that is taken, the kind of step's (instant, avg) too. Each set of pressure levels is an axis of its own; of several
    levels of another kind, such as depths of soil, each is a field of its own."""
    try:
        import cfgrib
    except ModuleNotFoundError:
        raise DataError(f"{path} is a GRIB file: pip install 'credit-hpc[grib]'") from None
    parts = cfgrib.open_datasets(path, backend_kwargs={"indexpath": ""})
    parts.sort(key=lambda part: PRESSURE not in part.dims)  # stable: these have the names first
    found: dict[str, xr.DataArray] = {}
    axes: dict[tuple[float, ...], str] = {}
    for part in parts:
        alone = [name for name, axis in part.coords.items() if axis.ndim == 0]  # at which one level, how far ahead
        if "valid_time" in alone:
            part = part.assign_coords(time=part.valid_time.values).expand_dims("time")
        part = part.drop_vars([name for name in alone if name != "time"])
        if PRESSURE in part.dims:
            levels = tuple(part[PRESSURE].values.tolist())
            part = part.rename({PRESSURE: axes.setdefault(levels, f"{PRESSURE}_{len(axes)}" if axes else PRESSURE)})
        for name, field in part.data_vars.items():
            kind, step = (field.attrs.get(f"GRIB_{key}", "other") for key in ("typeOfLevel", "stepType"))
            if kind in field.dims and kind != PRESSURE:
                each = {f"{name}_{kind}_{level:g}": field.sel({kind: level}, drop=True) for level in field[kind].values}
            else:
                names = [str(name), f"{name}_{kind}", f"{name}_{kind}_{step}"]
                each = {next((one for one in names if one not in found), names[-1]): field}
            twice = found.keys() & each.keys()
            if twice:
                raise DataError(f"{path} has two fields {twice.pop()}: take one out (grib_copy -w shortName!=...)")
            found |= each
    return xr.merge([field.rename(name) for name, field in found.items()], compat="no_conflicts", join="exact")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def chunk_of(key: str, encoding: dict[str, Any], shape: Sequence[int]) -> list[range] | None:
    """The places along each axis that the chunk at a key holds; None if that cannot be told."""
    sizes = encoding.get("shards") or encoding.get("chunks")
    numbers = [int(one) for one in re.findall(r"\d+", key.partition("/")[2])]
    if sizes is None or len(numbers) != len(sizes):
        return None
    ends = zip(numbers, sizes, shape, strict=True)
    return [range(number * size, min((number + 1) * size, length)) for number, size, length in ends]
