"""What announces the end of a job: noted at once, acted upon at the next step by all ranks together.

A signal, or the clock: `CREDIT_STOP_AT` is the time, in seconds since 1970, from which on a job should end. Job scripts
set it where the scheduler kills without a signal first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from credit.errors import LaunchError

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""USR2 for the time limit (NCCL takes USR1), TERM for preemption and for a user who ends the job."""


class StopRequest:
    """True once this rank has been asked to stop.

    Attributes:
        received: by what, if it has.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deadline = float(os.environ.get("CREDIT_STOP_AT", "inf"))

    def __bool__(self) -> bool:
        if self.received is None and time.time() > self._deadline:
            self.received = "CREDIT_STOP_AT"
        return self.received is not None

    def refuse_too_late(self) -> None:
        """Raise a LaunchError if the clock stops this job before it does anything: it would be requeued for ever."""
        if bool(self) and self.received == "CREDIT_STOP_AT":
            raise LaunchError(
                "the job's time is up (CREDIT_STOP_AT) before its first step, and would be in the next job too: ask "
                "for a longer time limit, or set CREDIT_STOP_BEFORE (seconds kept for saving) to less"
            )

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
