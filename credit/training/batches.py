"""Batches that all ranks agree on: the next one, the end, a stop, or an error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from credit.launch.stop import StopRequest
from credit.parallel.collectives import all_max, describe, gather_objects, share_failure


class AgreedBatches:
    """The batches; if reading one fails on any rank, all ranks stop with what it said.

    If any rank has a stop request, the last that comes is None, on every rank at the same step. One small all_reduce a
    batch: without it, peers would wait for the failing rank until their timeout.

    Attributes:
        waited: seconds that the rank which waited longest for the last batch has waited for it.
    """

    def __init__(
        self, batches: Iterable[dict[str, Tensor]], device: torch.device, request: StopRequest | None = None
    ) -> None:
        self._batches, self._device, self._request = batches, device, request
        self.waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor] | None]:
        iterator = iter(self._batches)
        while True:
            batch, error = None, None
            begin = time.perf_counter()
            try:
                batch = next(iterator, None)
            except Exception as caught:
                error = caught
            told = [error is not None, bool(self._request), time.perf_counter() - begin]
            failed, stop, self.waited = all_max(torch.tensor(told, dtype=torch.float64, device=self._device)).tolist()
            if failed:
                share_failure(gather_objects(None if error is None else describe(error)), "reading a batch", error)
            if batch is None:
                return
            if stop:
                yield None
                return
            yield batch
