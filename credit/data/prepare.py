"""Where the fields of a config are: a path, or data that come with the package, made ready in the run directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from credit.config import Config, Data, Source
from credit.data.statistics import Statistics, compute_statistics, origin_of
from credit.data.store import FieldStore
from credit.errors import Stopped
from credit.steps import of_months
from credit.stop import StopRequest

SAMPLES = {"era5-sample": Path(__file__).parent / "sample" / "era5_1deg.nc"}
DEMO = "demo"


def is_built_in(config: Config) -> bool:
    """True if the package can make the data and their statistics itself, in a minute."""
    return config.data.path[:1] in ([DEMO], *([name] for name in SAMPLES))


def stores_of(config: Config) -> list[Source]:
    """What `data.path` or `data.sources` means."""
    known = {DEMO: config.run / "demo.zarr", **SAMPLES} if is_built_in(config) else {}
    return [
        Source(path=[str(known.get(path, path)) for path in one.path], names=one.names) for one in config.data.stores
    ]


def _made_at(config: Config) -> Path:
    """Of built-in data."""
    return Path(stores_of(config)[0].path[0])


def is_made(config: Config) -> bool:
    """False for built-in data that are yet to be made, or have no statistics yet."""
    return not is_built_in(config) or (_made_at(config).exists() and config.stats_path.exists())


def open_fields(config: Config) -> FieldStore:
    """The stores of the config, at the times at which all that it reads is there."""
    data = config.data
    return _open(data, stores_of(config), [*data.predicted, *data.given])


def open_analysis(config: Config) -> FieldStore:
    """What a forecast from one start begins with: stores with states and statics, at times at which all states are."""
    return _open(config.data, config.forecast.source or stores_of(config), config.data.variables)


def _open(data: Data, stores: list[Source], variables: list[str]) -> FieldStore:
    return FieldStore(stores, variables, data.missing, data.is_region, data.hold, of_months(data.step))


def make_built_in(config: Config, request: StopRequest | None = None) -> None:
    """Write the demo store, if it is asked for, and the statistics of built-in data; once. For one rank to call.

    Raises:
        Stopped: once there is a request.
    """
    if not is_built_in(config):
        return
    path = _made_at(config)
    if config.data.path == [DEMO] and not path.exists():
        from credit.data.demo import write_demo

        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.unfinished"):  # by a job that was killed
            shutil.rmtree(left)
        write_demo(path, progress=printer(f"demo weather -> {path}", request))
    if not config.stats_path.exists():
        write_statistics(config, request)


def write_statistics(config: Config, request: StopRequest | None = None) -> Statistics:
    """Compute the statistics of the training period and save them where the config expects them."""
    store = open_fields(config)
    statistics = compute_statistics(config, store, printer(f"statistics -> {config.stats_path}", request))
    statistics.save(config.stats_path)
    return statistics


def load_fields_statistics(config: Config, store: FieldStore, names: list[str] | None = None) -> Statistics:
    """The statistics of every channel that the config reads, or of these variables among the predicted."""
    data = config.data
    wanted = store.channels(data.predicted if names is None else names, data.levels)
    predicted = [channel.name for channel in wanted]
    statistics = Statistics.load(config.stats_path, predicted, data.given, origin_of(config.data, store.grid))
    statistics.refuse_other_units(store, [*data.predicted, *data.given])
    return statistics


def printer(what: str, request: StopRequest | None = None) -> Callable[[int, int], None]:
    """Progress on one line in ten, and at the end; raises Stopped once there is a request."""
    begin = time.monotonic()
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if request:
            raise Stopped(f"by {request.received}, {done} of {total} into {what}: the same command begins that anew")
        if done * 10 // total > shown or done == total:
            shown = done * 10 // total
            elapsed = time.monotonic() - begin
            left = "" if done == total else f", ETA {elapsed * (total - done) / done:.0f} s"
            print(f"{what}: {done}/{total} in {elapsed:.0f} s{left}", flush=True)

    return show
