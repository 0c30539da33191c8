"""Signals that announce the end of a job: noted at once, acted upon at the next step by all ranks together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""USR2 for the time limit (NCCL takes USR1), TERM for preemption and for a user who ends the job."""


class StopRequest:
    """Attributes:
    received: name of the signal that came to this rank, if one did.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While this is open, `SIGNALS` are noted instead of ending the process. In the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request._note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
