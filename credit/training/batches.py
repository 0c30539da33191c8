"""Batches that all ranks agree on: the next one, the end, a stop, or an error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from credit.boundary import CAUGHT
from credit.domain_parallel.groups import message_device
from credit.parallel.collectives import all_sum, share_failure
from credit.stop import StopRequest

NORM = 64
"""Of the ranks' waits: a sum then tells the largest, 3 % more for 8 ranks that wait alike, 14 % for 4,096."""


class AgreedBatches:
    """The batches; if reading one fails on any rank, all ranks stop with what it said.

    If any rank has a stop request, the last that comes is None, on every rank at the same step. What ranks have to say
    of the next batch they say in one small message, between hosts where their group can do that, so that no device is
    waited for; without it, peers would wait for a failing rank until their timeout.

        for batch in batches:
            ...
            batches.agree()      # once for each batch, after its work was given to the device

    Attributes:
        waited: seconds that the rank which waited longest has waited for the batch that comes next.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]], request: StopRequest | None = None) -> None:
        self._batches, self._request = iter(batches), request
        self.waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor] | None]:
        self.agree()
        while True:
            if self._failed:
                share_failure(self._error, "reading a batch")
            if self._batch is None:
                return
            if self._stop:
                yield None
                return
            yield self._batch

    def agree(self) -> None:
        """Get the next batch, and hear what all ranks say of theirs."""
        self._batch: dict[str, Tensor] | None = None
        self._error: BaseException | None = None
        begin = time.perf_counter()
        try:
            self._batch = next(self._batches, None)
        except CAUGHT as caught:
            self._error = caught
        told = [self._error is not None, bool(self._request), (time.perf_counter() - begin) ** NORM]
        numbers = torch.tensor(told, dtype=torch.float64, device=message_device(dist.group.WORLD))
        failed, stop, waited = all_sum(numbers).tolist()
        self._failed, self._stop, self.waited = failed > 0, stop > 0, waited ** (1 / NORM)
