"""Messages under computation: what a recorded list of operators can do while they are under way.

An exchange is started as soon as what it sends is there, before what else was to come by then, and waited for when
nothing is left to do without it, up to the call to the peers that comes next. Operators have the operands that they
had: those that read or change one piece of memory, and those that draw random numbers, keep their order.

So do the calls to the peers (exchanges that start, collectives), on every rank, whatever its list, and a wait stays
behind its start. Ranks that understood each other in the old order do so in any such order, some of them in the old one
perhaps. For number the calls, which are the same on all ranks. A rank that stands still needs of the others no more
than that they reach a call: the collective that it is in, or the start of the exchange that it waits for. Take one that
needs the lowest number. Whom it waits for has not reached that call and stands still before it, so needs a lower one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from credit.domain_parallel.nodes import changed, draws, has_effect, storage
from credit.domain_parallel.wire import CALLS

_ops = torch.ops.credit
_START, _WAIT = _ops.start.default, _ops.wait.default
_CALLS = CALLS.keys() - {_WAIT}


class Crossing(NamedTuple):
    """The messages of one exchange.

    Attributes:
        bytes: that this rank sends.
        meanwhile: operators that compute something between start and wait. (Views do not.)
    """

    bytes: int
    meanwhile: int


def crossings(nodes: Iterable[fx.Node]) -> list[Crossing]:
    """The exchanges of a list of operators in which this rank sends anything."""
    computed, began, found = 0, dict[fx.Node, int](), list[Crossing]()
    for node in nodes:
        if node.target is _START:
            began[node] = computed
        elif node.target is _WAIT:
            start, sent = cast("tuple[fx.Node, list[fx.Node]]", node.args[:2])
            size = sum(x.meta["val"].nbytes for x in sent)
            found.append(Crossing(size, computed - began[start]))
        elif _computes(node):
            computed += 1
    return [one for one in found if one.bytes]


def _computes(node: fx.Node) -> bool:
    """It fills memory: its own, or that of another."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return False
    value = node.meta.get("val")
    is_view = isinstance(value, Tensor) and any(storage(x) == storage(node) for x in node.all_input_nodes)
    return not is_view or bool(changed(node))


def overlapped(nodes: list[fx.Node]) -> list[fx.Node]:
    """The same operators, in such an order."""
    return _Order(nodes).found


class _Order:
    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes, self.needs = nodes, _needs(nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.done: set[fx.Node] = set()
        self.found: list[fx.Node] = []
        self.passed = 0
        for call in [node for node in nodes if node.target in _CALLS]:
            self._reach(call)
        for node in [node for node in nodes if node.target is _WAIT and node not in self.done]:
            self._do_without_messages(len(nodes))
            self._reach(node)
        for node in nodes:
            self._do(node)

    def _do(self, node: fx.Node) -> None:
        if node not in self.done:
            self.done.add(node)
            self.found.append(node)

    def _reach(self, call: fx.Node) -> None:
        """Do what this call needs, and the call."""
        needed, todo = {call}, [call]
        while todo:
            for node in self.needs[todo.pop()]:
                if node not in self.done and node not in needed:
                    needed.add(node)
                    todo.append(node)
        for node in sorted(needed, key=self.place.__getitem__):
            if node.target is _WAIT:
                self._do_without_messages(self.place[call])
            self._do(node)

    def _do_without_messages(self, stop: int) -> None:
        """All that comes before that place and needs no message that is still under way."""
        while self.passed < stop and self.nodes[self.passed] in self.done:
            self.passed += 1
        for node in self.nodes[self.passed : stop]:
            if node.target is not _WAIT and node.target not in _CALLS and self.needs[node] <= self.done:
                self._do(node)


def _needs(nodes: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What has to be done before: what makes the operands, and what came before in the same memory, or to all."""
    known, needs = set(nodes), dict[fx.Node, set[fx.Node]]()
    writer: dict[object, fx.Node] = {}
    readers: dict[object, list[fx.Node]] = {}
    last: dict[str, fx.Node] = {}
    for node in nodes:
        needed = {x for x in node.all_input_nodes if x in known}
        written = {storage(x) for x in changed(node)}
        for memory in {storage(x) for x in node.all_input_nodes} | written:
            if memory in writer:
                needed.add(writer[memory])
            if memory in written:
                needed.update(readers.pop(memory, ()))
                writer[memory] = node
            else:
                readers.setdefault(memory, []).append(node)
        for kind in _ordered(node):
            if kind in last:
                needed.add(last[kind])
            last[kind] = node
        needs[node] = needed - {node}
    return needs


def _ordered(node: fx.Node) -> list[str]:
    """Of what kinds it is, of those that keep their order among each other."""
    if node.target is _WAIT:
        return ["wait"]  # messages of one rank to another come in order
    if node.target in _CALLS:
        return ["call"]
    return ["effect"] if draws(node) or (has_effect(node) and not changed(node)) else []
