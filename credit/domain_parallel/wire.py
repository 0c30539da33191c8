"""What crosses ranks, as operators that can be recorded; replayed, they are the calls of a group that eager code makes.

So a rank that replays and one that runs eagerly understand each other: the same messages of the same bytes, in the
same order, whatever a group is (processes, threads). Nothing has to be agreed on before a rank may replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.groups import Messages, RankGroup, Reduction
from credit.domain_parallel.torch_private_recording import keep_in_order

_groups: weakref.WeakValueDictionary[int, RankGroup] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[RankGroup, int] = weakref.WeakKeyDictionary()
_next = count()

_flying: dict[int, Messages] = {}
"""Messages that compiled code has started and not waited for, by number."""

_library = torch.library.Library("credit", "DEF")
_library.define("all_reduce(Tensor values, int group, str reduction) -> Tensor")
_library.define("all_gather(Tensor values, int group) -> Tensor")
_library.define(
    "start(Tensor[] outgoing, int[] targets, Tensor like, int[] sources, int[] shapes, int group) -> Tensor"
)
_library.define("wait(Tensor messages, Tensor[] outgoing, Tensor like, int[] sources, int[] shapes) -> Tensor[]")


def number_of(group: RankGroup) -> int:
    """By which a recorded call knows its group, in this process."""
    if group not in _numbers:
        _numbers[group] = number = next(_next)
        _groups[number] = group
    return _numbers[group]


def all_reduce(values: Tensor, group: int, reduction: Reduction) -> Tensor:
    return _groups[group].all_reduce(values, reduction)


def all_gather(values: Tensor, group: int) -> Tensor:
    return _groups[group].all_gather(values)


def start(
    outgoing: list[Tensor], targets: list[int], like: Tensor, sources: list[int], shapes: list[int], group: int
) -> Messages:
    """Begin to send `outgoing` to `targets`, and to receive tensors of `shapes`, one after another, from `sources`."""
    incoming = dict(zip(sources, _unpacked(shapes, len(sources)), strict=True))
    return _groups[group].start(dict(zip(targets, outgoing, strict=True)), incoming, like)


def wait(
    messages: Messages, outgoing: list[Tensor], like: Tensor, sources: list[int], shapes: list[int]
) -> list[Tensor]:
    """What came, in the order of `sources`. `outgoing` lives until here."""
    received = messages.wait()
    return [received[source] for source in sources]


def _unpacked(shapes: list[int], number: int) -> list[list[int]]:
    axes = len(shapes) // max(number, 1)
    return [shapes[i * axes : (i + 1) * axes] for i in range(number)]


def _start_numbered(outgoing: list[Tensor], targets: list[int], *rest: Any) -> Tensor:
    number = next(_next)
    _flying[number] = start(outgoing, targets, *rest)
    return torch.tensor(number)


def _wait_numbered(messages: Tensor, outgoing: list[Tensor], like: Tensor, *rest: Any) -> list[Tensor]:
    return wait(_flying.pop(int(messages)), outgoing, like, *rest)


for _name, _function in {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "start": _start_numbered,
    "wait": _wait_numbered,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"credit::{name}", lib=_library)


@_fake("all_reduce")
def _(values: Tensor, group: int, reduction: str) -> Tensor:
    return values.new_empty(values.shape)


@_fake("all_gather")
def _(values: Tensor, group: int) -> Tensor:
    return values.new_empty(_groups[group].size, *values.shape)


@_fake("start")
def _(outgoing: Any, targets: Any, like: Any, sources: Any, shapes: Any, group: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@_fake("wait")
def _(messages: Any, outgoing: Any, like: Tensor, sources: list[int], shapes: list[int]) -> list[Tensor]:
    return [like.new_empty(shape) for shape in _unpacked(shapes, len(sources))]


CALLS = {
    torch.ops.credit.all_reduce.default: all_reduce,
    torch.ops.credit.all_gather.default: all_gather,
    torch.ops.credit.start.default: start,
    torch.ops.credit.wait.default: wait,
}
"""What a recorded operator is, where nothing compiles it."""


@cache
def keep_order() -> None:
    """From now on compilers do not change the order of messages."""
    for operator in CALLS:
        keep_in_order(operator)


class Operators:
    """A `Scribe` that writes a group's calls down as operators."""

    def all_reduce(self, group: RankGroup, values: Tensor, reduction: Reduction) -> Tensor:
        return torch.ops.credit.all_reduce(values.detach().resolve_conj(), number_of(group), reduction)

    def all_gather(self, group: RankGroup, values: Tensor) -> Tensor:
        return torch.ops.credit.all_gather(values.detach().resolve_conj(), number_of(group))

    def start(
        self, group: RankGroup, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor
    ) -> Messages:
        sent = {peer: tensor.detach() for peer, tensor in outgoing.items()}
        like, sources = like.detach(), [*incoming]
        if len({len(shape) for shape in incoming.values()}) > 1:
            raise NotImplementedError("messages of different numbers of axes")
        shapes = [n for shape in incoming.values() for n in shape]
        given = [*sent.values()], [*sent], like, sources, shapes, number_of(group)
        handle = torch.ops.credit.start(*given)

        def receive() -> dict[int, Tensor]:
            found = torch.ops.credit.wait(handle, given[0], like, sources, shapes)
            return dict(zip(sources, found, strict=True))

        return Messages(receive)
