"""credit data: stores, and statistics of them."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file, whole
from credit.commands.parser import add_parser
from credit.commands.verb import add_verb, load
from credit.errors import ConfigError

EXAMPLES = """examples:
  credit data describe era5.zarr
  credit data describe 'analysis_*.grib' s3://bucket/era5.zarr
  credit data stats my.yaml
  credit data rechunk era5.zarr era5_rows.zarr --rows 32
  credit data regrid era5.zarr era5_coarse.zarr --grid 121x240
  credit data demo demo.zarr --states 60
"""


def examples(verb: str) -> str:
    """Those of one verb."""
    head, *lines = EXAMPLES.splitlines(keepends=True)
    return "".join([head, *(line for line in lines if line.startswith(f"  credit data {verb}"))])


def add(verbs: Any) -> None:
    kinds = add_parser(verbs, "data", "describe, copy and make stores, and statistics of them", EXAMPLES).add_verbs()
    summary = "write the normalisation statistics of the training period"
    add_verb(kinds, "stats", stats_data, summary, examples("stats"))
    summary = "say what is in stores, and write the `data` block of a config that fits"
    describe = add_parser(kinds, "describe", summary, examples("describe"))
    describe.add_argument("paths", nargs="+", metavar="PATH", help="zarr stores, netCDF files, patterns, addresses")
    describe.set_defaults(verb=describe_data)
    summary = "copy a store into chunks of latitudes, of which domain ranks read their own"
    copy = add_parser(kinds, "rechunk", summary, examples("rechunk"))
    copy.add_argument("source", metavar="STORE", help="a zarr store or netCDF file")
    copy.add_argument("path", type=file, metavar="COPY", help="the zarr store to write")
    copy.add_argument("--rows", type=whole(), default=None, help="latitudes of a chunk (default: a sixteenth)")
    copy.add_argument("--times", type=whole(), default=1, help="times of a chunk (default: 1)")
    copy.set_defaults(verb=rechunk_data)
    summary = "copy a store, or forecasts, onto a coarser grid, by area"
    coarser = add_parser(kinds, "regrid", summary, examples("regrid"))
    coarser.add_argument("source", metavar="STORE", help="a zarr store or netCDF file of the globe")
    coarser.add_argument("path", type=file, metavar="COPY", help="the zarr store to write")
    coarser.add_argument("--grid", required=True, metavar="LATxLON", help="such as 121x240; odd: with the poles")
    coarser.set_defaults(verb=regrid_data)
    demo = add_parser(kinds, "demo", "write the demo weather, a CF zarr store", examples("demo"))
    demo.add_argument("path", type=file, metavar="STORE", help="the zarr store to write")
    demo.add_argument("--states", type=whole(), default=600, help="6-hourly states (default: 600)")
    demo.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the weather (default: 0)")
    demo.set_defaults(verb=demo_data)


def stats_data(arguments: argparse.Namespace) -> None:
    from credit.data.prepare import write_statistics

    statistics = write_statistics(load(arguments))
    for name, mean in statistics.mean.items():
        change = statistics.increment_std.get(name)
        step = "" if change is None else f"  change per step {change:.6g}"
        print(f"{name}: mean {mean:.6g}  std {statistics.std[name]:.6g}{step}")


def describe_data(arguments: argparse.Namespace) -> None:
    from credit.data.describe import describe

    print(describe(arguments.paths))


def rechunk_data(arguments: argparse.Namespace) -> None:
    from credit.data.prepare import printer
    from credit.data.rechunk import rechunk

    progress = printer(f"{arguments.source} -> {arguments.path}")
    rechunk(arguments.source, arguments.path, arguments.rows, arguments.times, progress)


def regrid_data(arguments: argparse.Namespace) -> None:
    from credit.data.prepare import printer
    from credit.data.regrid import regrid

    shape = tuple(int(part) if part.isdigit() else 0 for part in arguments.grid.split("x"))
    if len(shape) != 2 or min(shape) < 2:
        raise ConfigError(f"--grid {arguments.grid!r}: write latitudes and longitudes, like 121x240")
    regrid(arguments.source, arguments.path, shape, printer(f"{arguments.source} -> {arguments.path}"))


def demo_data(arguments: argparse.Namespace) -> None:
    from credit.data.demo import write_demo
    from credit.data.prepare import printer

    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    write_demo(arguments.path, states=arguments.states, seed=arguments.seed, progress=printer(str(arguments.path)))
