"""A backend, gloo underneath, that makes communicators as NCCL does: at a group's first call, with all of its ranks.

If the first call is a message in which some rank of the group takes no part, the others wait for that rank.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Lazily(dist.ProcessGroup):
    patience_s = 3.0
    """Then waiting ranks raise what NCCL's watchdog would."""
    unplugged = False
    """This rank's device reaches no other one: communicators that are not there yet are never made."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._store, self._made, self._generation = store, False, 0
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _ready(self) -> Any:
        members = [f"communicator/{self._generation}/{one}" for one in range(self.size())]
        if not self._made:
            if not self.unplugged:
                self._store.set(members[self.rank()], "")
            try:
                self._store.wait(members, timedelta(seconds=self.patience_s))
            except (RuntimeError, dist.DistError):
                raise RuntimeError("NCCL error: not all ranks of the group made its first call") from None
            self._made = True
        return self._gloo

    def cool(self) -> None:
        """Forget the communicator, on all ranks."""
        self._made, self._generation = False, self._generation + 1

    def allreduce(self, *given: Any) -> Any:
        return self._ready().allreduce(*given)

    def allgather(self, *given: Any) -> Any:
        return self._ready().allgather(*given)

    def send(self, *given: Any) -> Any:
        return self._ready().send(*given)

    def recv(self, *given: Any) -> Any:
        return self._ready().recv(*given)

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "lazily"


dist.Backend.register_backend("lazily", Lazily, devices=["cpu"])
