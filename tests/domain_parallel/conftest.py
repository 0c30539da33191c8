from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from credit.domain_parallel.thread_ranks import ThreadWorld


@pytest.fixture(scope="session")
def threads() -> Callable[[int], ThreadWorld]:
    """threads(n): a world of n ranks that are threads."""
    return cache(ThreadWorld)
