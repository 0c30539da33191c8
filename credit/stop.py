"""What announces the end of a job: noted at once, acted upon at the next step by all ranks together.

A signal, or the clock: `CREDIT_STOP_AT` is the time, in seconds since 1970, from which on a job should end. Job scripts
set it where the scheduler kills without a signal first.
"""

from __future__ import annotations

import os
import signal
import socket
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
        clock_ahead: seconds by which this host's clock is wrong, as far as is known.

    Raises:
        LaunchError: if CREDIT_STOP_AT is no time.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.clock_ahead = 0.0
        text = os.environ.get("CREDIT_STOP_AT", "inf")
        try:
            self._deadline = float(text)
        except ValueError:
            self._deadline = -1.0
        if not self._deadline >= 0:  # nor nan
            raise LaunchError(f"CREDIT_STOP_AT is {text!r}, and must be seconds since 1970: date +%s")

    def __bool__(self) -> bool:
        if self.received is None and time.time() - self.clock_ahead > self._deadline:
            self.received = "CREDIT_STOP_AT"
        return self.received is not None

    def refuse_too_late(self) -> None:
        """Raise a LaunchError if the clock stops this job before it does anything: it would be requeued for ever."""
        if bool(self) and self.received == "CREDIT_STOP_AT":
            now = time.time() - self.clock_ahead
            raise LaunchError(
                f"the job's time is up (CREDIT_STOP_AT) before its first step, and would be in the next job too: it is "
                f"{_utc(self._deadline)}, and the clock of {socket.gethostname()} says {_utc(now)}. If that is right, "
                f"ask for a longer time limit, or set CREDIT_STOP_BEFORE (seconds kept for saving) to less; if not, "
                f"have the clock set"
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
