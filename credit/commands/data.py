"""credit data: stores, and statistics of them."""

from __future__ import annotations

import argparse
from typing import Any

from credit.bounds import file, whole
from credit.commands.verb import add_verb, load
from credit.errors import ConfigError


def add(verbs: Any) -> None:
    data = verbs.add_parser("data", help="make data, and statistics of data")
    kinds = data.add_subparsers(title="verbs", required=True, metavar="VERB")
    add_verb(kinds, "stats", stats_data, "write the normalisation statistics of the training period")
    describe = kinds.add_parser("describe", help="what is in stores, and the `data` block of a config that fits")
    describe.add_argument("paths", nargs="+", metavar="PATH", help="zarr stores, netCDF files, patterns, addresses")
    describe.set_defaults(verb=describe_data)
    copy = kinds.add_parser(
        "rechunk", help="copy a store into chunks of latitudes, of which domain ranks read their own"
    )
    copy.add_argument("source", metavar="STORE", help="a zarr store or netCDF file")
    copy.add_argument("path", type=file, metavar="COPY", help="the zarr store to write")
    copy.add_argument("--rows", type=whole(), default=None, help="latitudes of a chunk (default: a sixteenth)")
    copy.add_argument("--times", type=whole(), default=1, help="times of a chunk (default: 1)")
    copy.set_defaults(verb=rechunk_data)
    coarser = kinds.add_parser("regrid", help="copy a store, or forecasts, onto a coarser grid, by area")
    coarser.add_argument("source", metavar="STORE", help="a zarr store or netCDF file of the globe")
    coarser.add_argument("path", type=file, metavar="COPY", help="the zarr store to write")
    coarser.add_argument("--grid", required=True, metavar="LATxLON", help="such as 121x240; odd: with the poles")
    coarser.set_defaults(verb=regrid_data)
    demo = kinds.add_parser("demo", help="write the demo weather, a CF zarr store")
    demo.add_argument("path", type=file)
    demo.add_argument("--states", type=whole(), default=600, help="6-hourly states (default: 600)")
    demo.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
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
