"""How many operators a step launches, of the plain model and of a rank of two; and how many while messages fly.

    python -m tests.domain_parallel.launches [unet ...]

Views launch nothing, nor do tensors of which nothing is filled in. What crosses ranks is one launch a call, and one
more for each message that has to be made contiguous. The models are those of `benchmarks.recorded`: as deep as the
shipped ones, and narrow.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.recorded import CASES, step
from credit.domain_parallel import convert_to_domain_parallel, record, shard_tensor
from credit.domain_parallel.groups import Messages, RankGroup, Reduction, written_by
from credit.domain_parallel.overlap import Crossing
from credit.domain_parallel.thread_ranks import thread_ranks
from credit.domain_parallel.torch_private import TorchDispatchMode, no_dispatch_modes
from credit.models import DOMAIN_CONVERTERS
from tests.domain_parallel import parity

_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "promote_types")


class Launches(TorchDispatchMode):
    """Counts them, by name. As a `Scribe` it counts what crosses ranks, which then does."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        returned = [x.alias_info for x in func._schema.returns]
        is_view = all(x is not None and not x.is_write for x in returned)
        if not is_view and name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def all_reduce(self, group: RankGroup, values: Tensor, reduction: Reduction) -> Tensor:
        self.counts["all_reduce"] += 1
        return _unseen(lambda: group.all_reduce(values, reduction))

    def all_gather(self, group: RankGroup, values: Tensor) -> Tensor:
        self.counts["all_gather"] += 1
        return _unseen(lambda: group.all_gather(values))

    def start(
        self, group: RankGroup, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor
    ) -> Messages:
        self.counts["contiguous"] += sum(not x.is_contiguous() for x in outgoing.values())
        self.counts["messages"] += bool(outgoing or incoming)
        messages = _unseen(lambda: group.start(outgoing, incoming, like))
        return Messages(lambda: _unseen(messages.wait))


def _unseen(call: Callable[[], Any]) -> Any:
    with no_dispatch_modes(), written_by(None):  # type: ignore[arg-type]
        return call()


def counted(model: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Of a forward and of a backward, the second of each: what is made once is made by then."""
    model(x).sum().backward()
    model.zero_grad()
    with Launches() as forward, written_by(forward):
        y = model(x)
    cotangent = torch.ones_like(y)
    with Launches() as backward, written_by(backward):
        y.backward(cotangent)
    return forward.counts, backward.counts


def sharded(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The model on this rank, and its rows of a field."""
    torch.manual_seed(0)
    manager = parity.manager()
    model = convert_to_domain_parallel(build(), manager, custom_converters=DOMAIN_CONVERTERS)
    return model, shard_tensor(torch.randn(shape), -2, manager)


def counted_here(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[Counter[str], Counter[str]]:
    return counted(*sharded(build, shape))


def crossings_here(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[Crossing]:
    model, x = sharded(build, shape)
    record(model)
    for _ in range(2):
        step(model, x)
    return model.__dict__["_domain_border"].recorder.crossings()


class Overlap(NamedTuple):
    """What is computed while messages are under way.

    Attributes:
        share: of the bytes, for which anything is.
        operators: that are, on average over the bytes.
    """

    share: float
    operators: float


def overlap(build: Callable[[], nn.Module], shape: tuple[int, ...], size: int = 2) -> list[Overlap]:
    """Of a recorded step, by rank."""
    with thread_ranks(size) as world:
        ranks = world.run(crossings_here, build, shape)
    totals = [sum(one.bytes for one in rank) for rank in ranks]
    return [
        Overlap(
            sum(one.bytes for one in rank if one.meanwhile) / total,
            sum(one.bytes * one.meanwhile for one in rank) / total,
        )
        for rank, total in zip(ranks, totals, strict=True)
    ]


def compared(name: str, size: int = 2) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Of a model of `CASES`: by direction, the plain model's and those of the rank that launches most."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    plain = counted(build(), torch.randn(shape))
    with thread_ranks(size) as world:
        ranks = world.run(counted_here, build, shape)
    return {
        direction: (plain[i], max((rank[i] for rank in ranks), key=Counter.total))
        for i, direction in enumerate(("forward", "backward"))
    }


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    print("model           direction   plain   a rank of 2   ratio")
    for name in names:
        found = compared(name)
        found["both"] = tuple(sum((x[i] for x in found.values()), Counter()) for i in range(2))  # type: ignore[assignment]
        for direction, (plain, rank) in found.items():
            ratio = rank.total() / plain.total()
            print(f"{name:15s} {direction:9s} {plain.total():7d} {rank.total():13d} {ratio:7.2f}", flush=True)
    print("\nmodel           rank   bytes sent under computation   operators meanwhile, by bytes")
    for name in names:
        for number, (share, operators) in enumerate(overlap(*CASES[name])):
            print(f"{name:15s} {number:4d} {share:30.0%} {operators:31.1f}", flush=True)


if __name__ == "__main__":
    main()
