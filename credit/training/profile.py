"""A chrome trace of a few training steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BEFORE = 2
"""Steps that are not recorded: one that allocates, one that warms the profiler."""


class Profile:
    """Records `steps` optimiser steps on one rank, does nothing on the others.

    Args:
        directory: where `profile-STEP.json` is written, after the first of the recorded steps.
        first: steps done before this run.
        steps: how many to record; 0 for none.
        active: true on the rank that records.
    """

    def __init__(self, directory: Path, first: int, steps: int, active: bool) -> None:
        self._path = directory / f"profile-{first + BEFORE + 1:08d}.json"
        self._profiler: Any = None
        if steps > 0 and active:
            schedule = torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)

    def __enter__(self) -> Profile:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def step(self) -> None:
        """Call after every optimiser step."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(self, *error: Any) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self._path))
        print(f"profile -> {self._path}", flush=True)
