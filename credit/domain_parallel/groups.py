"""The ranks that share a tensor. All that crosses ranks inside a model goes through a `RankGroup`.

A group is one of: the processes of a process group (`ProcessRanks`), threads of one process that take turns
(`credit.domain_parallel.thread_ranks`), a rank between others that are not there, of which the traffic alone is of
interest (`CountingRanks`), or a rank by itself (`Alone`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "max"]

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass
class Traffic:
    """What this rank has given to its group since `reset`.

    Attributes:
        messages: point-to-point messages sent (halo rows and their gradients).
        bytes: payload of those messages.
        collectives: collective calls (norm statistics, settling of lengths).
        collective_bytes: what this rank gave to them.
    """

    messages: int = 0
    bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0

    def reset(self) -> None:
        self.messages = self.bytes = self.collectives = self.collective_bytes = 0


class Messages:
    """Messages under way."""

    def __init__(self, receive: Callable[[], dict[int, Tensor]]) -> None:
        self._receive = receive

    def wait(self) -> dict[int, Tensor]:
        """What came, by the rank that sent it. To be called once."""
        return self._receive()


class Scribe(Protocol):
    """Writes calls of a group down, instead of doing them; see `credit.domain_parallel.wire`."""

    def all_reduce(self, group: RankGroup, values: Tensor, reduction: Reduction) -> Tensor: ...

    def all_gather(self, group: RankGroup, values: Tensor) -> Tensor: ...

    def start(
        self, group: RankGroup, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor
    ) -> Messages: ...


class _State(threading.local):
    scribe: Scribe | None = None


_state = _State()


@contextmanager
def written_by(scribe: Scribe) -> Iterator[None]:
    """While it lasts, nothing crosses ranks in this thread: what would is written down by `scribe`."""
    before, _state.scribe = _state.scribe, scribe
    try:
        yield
    finally:
        _state.scribe = before


class RankGroup(ABC):
    """Some ranks, seen from one of them. What is given stays as it is; what comes back is new.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
        traffic: what this rank has given.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.traffic = Traffic()

    @property
    def message_device(self) -> torch.device:
        """Where small control messages live: the CPU if the group can do that."""
        return torch.device("cpu")

    def all_reduce(self, values: Tensor, reduction: Reduction = "sum") -> Tensor:
        """The sum, or the maximum, of the ranks' `values`, on all of them."""
        if _state.scribe is not None:
            return _state.scribe.all_reduce(self, values, reduction)
        self._count(values)
        return self._all_reduce(values.resolve_conj(), reduction)

    def all_gather(self, values: Tensor) -> Tensor:
        """(rank, ...): the `values` of every rank, which are of one shape."""
        if _state.scribe is not None:
            return _state.scribe.all_gather(self, values)
        self._count(values)
        return self._all_gather(values.resolve_conj())

    def start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages:
        """Begin to send a tensor to each rank of `outgoing`, and to receive one from each of `incoming`.

        Args:
            outgoing: what to send, by rank; not to be changed before the wait. Empty tensors are not sent.
            incoming: shapes of what comes, by rank.
            like: of the type, and on the device, of what comes.
        """
        if _state.scribe is not None:
            return _state.scribe.start(self, outgoing, incoming, like)
        sends = {peer: tensor.resolve_conj() for peer, tensor in outgoing.items() if tensor.numel()}
        self.traffic.messages += len(sends)
        self.traffic.bytes += sum(tensor.nbytes for tensor in sends.values())
        return self._start(sends, incoming, like)

    def allow_messages(self) -> None:
        """Raise an error if tensors may not go from rank to rank. Asked on every rank, also on those that send none."""
        return

    def _count(self, given: Tensor) -> None:
        self.traffic.collectives += 1
        self.traffic.collective_bytes += given.nbytes

    @abstractmethod
    def _all_reduce(self, values: Tensor, reduction: Reduction) -> Tensor: ...

    @abstractmethod
    def _all_gather(self, values: Tensor) -> Tensor: ...

    @abstractmethod
    def _start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages: ...

    # The ranks of a group are where they are: a copied model keeps its group.
    def __deepcopy__(self, memo: dict[str, Any]) -> RankGroup:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rank} of {self.size})"


class ProcessRanks(RankGroup):
    """The processes of a process group, over gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.process_group = group

    @property
    def message_device(self) -> torch.device:
        return message_device(self.process_group)

    def _all_reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, _REDUCTIONS[reduction], group=self.process_group)
        return total

    def _all_gather(self, values: Tensor) -> Tensor:
        everyone = values.new_empty(self.size, *values.shape)
        dist.all_gather(list(everyone.unbind()), values, group=self.process_group)
        return everyone

    def _start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages:
        received = {peer: like.new_empty(shape) for peer, shape in incoming.items()}
        sent = {peer: tensor.contiguous() for peer, tensor in outgoing.items()}
        ops = [self._op(dist.isend, tensor, peer) for peer, tensor in sent.items()]
        ops += [self._op(dist.irecv, tensor, peer) for peer, tensor in received.items() if tensor.numel()]
        requests = dist.batch_isend_irecv(ops) if ops else []

        def receive() -> dict[int, Tensor]:
            for request in requests:
                request.wait()
            sent.clear()  # what is sent must live until it is sent
            return received

        return Messages(receive)

    def _op(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, dist.get_global_rank(self.process_group, peer), self.process_group)


class CountingRanks(RankGroup):
    """A rank between others, all with as much as it has; nothing is sent, everything is counted.

    For tensors without values: what comes back has the right shape, and no meaning.
    """

    def _all_reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        return values.detach().clone(memory_format=torch.contiguous_format)

    def _all_gather(self, values: Tensor) -> Tensor:
        return values.expand(self.size, *values.shape).clone()

    def _start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages:
        received = {peer: like.new_empty(shape) for peer, shape in incoming.items()}
        return Messages(lambda: received)


class Alone(CountingRanks):
    """A rank without others: it has what all have."""

    def __init__(self) -> None:
        super().__init__(0, 1)


def message_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where small messages of a group live: the CPU if the group can do that, so that no device is waited for."""
    if group is None or "gloo" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device(device_type(), torch.accelerator.current_device_index())


def device_type() -> str:
    """Of the tensors that the default process group moves."""
    backend = dist.get_backend()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if backend == "gloo" or accelerator is None else accelerator.type
