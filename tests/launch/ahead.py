"""Work whose results tests look at, begun before they ask and several at a time: most of it waits for something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest


class Timed(NamedTuple):
    """What a piece of work gave, and the seconds that it took."""

    value: Any
    seconds: float


Results = Callable[[str], Timed]
"""The result of the work of that name, waited for; what the work raised is raised here."""


@contextmanager
def ahead(work: Mapping[str, Callable[[], Any]], names: list[str], workers: int) -> Iterator[Results]:
    """Begin the work of these names, in the order of `work`."""
    pool = ThreadPoolExecutor(workers)
    begun = {name: pool.submit(_timed, do) for name, do in work.items() if name in names}
    try:
        yield lambda name: begun[name].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _timed(do: Callable[[], Any]) -> Timed:
    begin = time.monotonic()
    return Timed(do(), time.monotonic() - begin)


def asked_for(session: pytest.Session, fixture: str) -> list[str]:
    """The parameters that the selected tests give to a fixture."""
    calls = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return [params[fixture] for params in calls if fixture in params]
