"""What a step does, counted while it runs: floating-point operations and live bytes, bytes and calls on the wire."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from credit.domain_parallel.parking import Live, storages
from credit.domain_parallel.torch_private import TorchDispatchMode, tree_leaves


class Meter(Live, TorchDispatchMode):
    """Counts what is done while it is on: floating-point operations of convolutions and products of matrices, `flops`;
    bytes of storages that are made and alive, `now`, and at most, `peak`."""

    def __init__(self) -> None:
        Live.__init__(self)
        TorchDispatchMode.__init__(self)
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for storage in storages((out,)):
            self.meet(storage)
        return out


class Wire(TorchDispatchMode):
    """Bytes that this rank sends, and how many messages and collectives it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d" and name not in ("recv_", "barrier"):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        self.calls += 1
        self.names[name] += 1
        if name == "send":
            self.bytes += sum(sizes)
        elif name == "allreduce_":
            self.bytes += 2 * sum(sizes) * (ranks - 1) // ranks
        elif name == "allgather_":  # a list of outputs, and what each rank gives
            self.bytes += min(sizes) * (ranks - 1)
        else:  # the larger of what goes in and comes out is the whole
            self.bytes += max(sizes) * (ranks - 1) // ranks
