"""Where the fields of a config are: a path, or data that come with the package, made ready in the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from credit.config import Config
from credit.data.statistics import Statistics, compute_statistics, origin_of
from credit.data.store import FieldStore, stored_names

SAMPLES = {"era5-sample": Path(__file__).parent / "sample" / "era5_1deg.nc"}
DEMO = "demo"


def is_built_in(config: Config) -> bool:
    """True if the package can make the data and their statistics itself, in a minute."""
    return config.data.path == DEMO or config.data.path in SAMPLES


def store_path(config: Config) -> Path:
    """The store that `data.path` means."""
    if config.data.path == DEMO:
        return config.run / "demo.zarr"
    return SAMPLES.get(config.data.path) or Path(config.data.path)


def make_built_in(config: Config) -> None:
    """Write the demo store, if it is asked for, and the statistics of built-in data; once. For one rank to call."""
    if not is_built_in(config):
        return
    path = store_path(config)
    if config.data.path == DEMO and not path.exists():
        from credit.data.demo import write_demo

        path.parent.mkdir(parents=True, exist_ok=True)
        write_demo(path, progress=printer(f"demo weather -> {path}"))
    if not config.stats_path.exists():
        write_statistics(config)


def write_statistics(config: Config) -> Statistics:
    """Compute the statistics of the training period and save them where the config expects them."""
    store = FieldStore(store_path(config))
    statistics = compute_statistics(config, store, printer(f"statistics -> {config.stats_path}"))
    statistics.save(config.stats_path)
    return statistics


def load_fields_statistics(config: Config, store: FieldStore) -> Statistics:
    """The statistics of every channel that the config reads."""
    data = config.data
    predicted = [channel.name for channel in store.channels(data.variables, data.levels)]
    others = [channel.name for channel in store.channels(stored_names([*data.forcings, *data.statics]))]
    return Statistics.load(config.stats_path, predicted, others, origin_of(config.data, store.grid))


def printer(what: str) -> Callable[[int, int], None]:
    """Progress on one line in ten, and at the end."""
    begin = time.monotonic()
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown or done == total:
            shown = done * 10 // total
            elapsed = time.monotonic() - begin
            left = "" if done == total else f", ETA {elapsed * (total - done) / done:.0f} s"
            print(f"{what}: {done}/{total} in {elapsed:.0f} s{left}", flush=True)

    return show
