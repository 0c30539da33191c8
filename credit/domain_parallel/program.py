"""A function of tensors, written down as two straight lists of operators: its forward, and its backward.

It is run once on tensors without values (torch's fake tensors), forward and backward in one go, and the list is cut
between the two. Nothing in it is replaced or made functional: replayed, it is the calls of operators that eager code
makes, with the same operands, changes in place and random draws included; in the same order, but for what may go on
while messages are under way (see `overlap`). What a function does besides (reads values, keeps tensors in other places)
makes it `NotRecordable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from credit.domain_parallel import wire
from credit.domain_parallel.autocast import NONE, Autocast
from credit.domain_parallel.groups import written_by
from credit.domain_parallel.nodes import changed, draws, has_effect, sharing, storage
from credit.domain_parallel.overlap import Crossing, crossings, overlapped
from credit.domain_parallel.torch_private import TorchDispatchMode, no_dispatch_modes
from credit.domain_parallel.torch_private_recording import FakeTensor, FakeTensorMode, boxed, inductor

Function = Callable[[list[Tensor]], list[Tensor]]
Boxed = Callable[[list[Tensor]], tuple[Any, ...]]
"""Empties the list that it is given."""

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
"""Operators that return what they are given, where nothing records gradients."""


class NotRecordable(Exception):
    """Says what a function does that a list of operators does not."""


class Given(NamedTuple):
    """What an input is like."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor, requires_grad: bool) -> Given:
        return cls(x.shape, x.stride(), x.dtype, x.device, requires_grad)

    def empty(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)


class Layout(NamedTuple):
    """How a cotangent is stored, and where autocast is on in the backward that it starts."""

    strides: tuple[int, ...]
    dtype: torch.dtype
    autocast: Autocast

    @classmethod
    def of(cls, x: Tensor, autocast: Autocast = NONE) -> Layout:
        return cls(x.stride(), x.dtype, autocast)


@dataclass(frozen=True)
class Program:
    """What `record` makes.

    Attributes:
        forward: from all inputs to (*outputs, *what the backward needs of what it has computed).
        backward: from (*inputs it needs, *what it needs of the forward, cotangent) to gradients; None without any.
        outputs: how many.
        differentiable: which output has a gradient; None if none does.
        needed: numbers of the inputs that the backward needs.
        saved: names of what it needs of the forward.
        slots: of which input each gradient is, in the order in which eager code adds them up.
        changed: numbers of the inputs that the forward changes in place.
        watched: numbers of the inputs and outputs that share memory with what the backward needs.
        cotangent: how the output's was stored.
        crossings: the messages of the forward, and of the backward.
    """

    forward: Boxed
    backward: Boxed | None
    outputs: int
    differentiable: int | None
    needed: tuple[int, ...]
    saved: tuple[str, ...]
    slots: tuple[int, ...]
    changed: tuple[int, ...]
    watched: tuple[tuple[int, ...], tuple[int, ...]]
    cotangent: Layout | None
    crossings: tuple[list[Crossing], list[Crossing]]


def record(
    function: Function,
    given: Sequence[Given],
    changeable: Sequence[int] = (),
    cotangent: Layout | None = None,
    compiled: bool = False,
) -> Program:
    """Write down a call of `function`, and its backward.

    Args:
        function: from tensors to tensors, of which one at most has a gradient.
        given: what these are like.
        changeable: numbers of those that the forward may change in place.
        compiled: by torch's inductor.
        cotangent: how that of the output is stored; by default as the output is, and without autocast.

    Raises:
        NotRecordable: see there.
        what `function` raises, and what it raises without values.
    """
    call = _compiled if compiled else _called
    return _Listing(_written(function, given, cotangent), frozenset(changeable)).program(call)


class _Written(NamedTuple):
    """A call and its backward, one operator after another.

    Attributes:
        graph: inputs, operators, and no output.
        constants: tensors that were made of numbers, by the names of their nodes.
        inputs, outputs, gradients: nodes.
        slots: of which input each gradient is.
        differentiable: numbers of the outputs with a gradient.
        cotangent: of that output, where the backward begins.
    """

    graph: fx.Graph
    constants: nn.Module
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    gradients: list[fx.Node]
    slots: list[int]
    differentiable: list[int]
    cotangent: tuple[fx.Node, Layout] | None


class _Writer(TorchDispatchMode):
    """Writes down every operator that is called, on tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.constants = fx.Graph(), nn.Module()
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}

    def input(self, x: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.nodes)}")
        self._name(x, node)
        return node

    def node_of(self, x: Tensor) -> fx.Node:
        return self.nodes[id(x)][1]

    def _name(self, x: Tensor, node: fx.Node) -> None:
        self.nodes[id(x)] = x, node  # kept, so that no other gets its id
        node.meta["val"] = x

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor | tuple | list | None):
            return found  # of a shape or a device, as nothing here has values
        named = {name: self._operand(x) for name, x in kwargs.items()}
        node = self.graph.call_function(func, tuple(map(self._operand, args)), named)
        if isinstance(found, Tensor):
            self._made(found, node)
        elif isinstance(found, tuple | list):
            for i, x in enumerate(found):
                if isinstance(x, Tensor):
                    self._made(x, self.graph.call_function(getitem, (node, i)))
        return found

    def _made(self, x: Tensor, node: fx.Node) -> None:
        if id(x) not in self.nodes:  # else it was changed in place
            self._name(x, node)

    def _operand(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            known = self.nodes.get(id(x))
            return self._constant(x) if known is None else known[1]
        if isinstance(x, tuple | list):
            return [self._operand(one) for one in x]
        if isinstance(x, torch.Generator):
            raise NotRecordable("it draws from a generator of its own")
        return x

    def _constant(self, x: Tensor) -> fx.Node:
        if isinstance(x, FakeTensor):
            raise NotRecordable("it uses a tensor that was not seen to be made")
        name = f"constant_{len(self.nodes)}"
        self.constants.register_buffer(name, x)
        node = self.graph.get_attr(name)
        self._name(x, node)
        return node


def _written(function: Function, given: Sequence[Given], cotangent: Layout | None) -> _Written:
    mode, writer = FakeTensorMode(allow_non_fake_inputs=False, static_shapes=True), _Writer()
    found: list[tuple[int, Tensor]] = []
    start = None
    # Autocast keeps casts of weights, and must not meet those of another run, nor keep these.
    torch.clear_autocast_cache()
    try:
        with no_dispatch_modes(), written_by(wire.Operators()), mode, _NoSwaps(), _one_thread():
            inputs = [x.empty() for x in given]
            nodes = [writer.input(x) for x in inputs]
            with writer:
                outputs = function([*inputs])
                wanted = [i for i, x in enumerate(outputs) if x.requires_grad]
                if len(wanted) > 1:
                    raise NotRecordable(f"it has {len(wanted)} outputs with a gradient")
                if wanted:
                    y = outputs[wanted[0]]
                    layout = cotangent or Layout.of(y)
                    tangent = torch.empty_strided(y.shape, layout.strides, dtype=layout.dtype, device=y.device)
                    start = writer.node_of(tangent), layout
                    with layout.autocast.again():
                        found = _contributions(y, inputs, tangent)
    finally:
        torch.clear_autocast_cache()
    ours, gradients = ([writer.node_of(x) for x in listed] for listed in (outputs, [x for _, x in found]))
    return _Written(
        writer.graph, writer.constants, nodes, ours, gradients, [number for number, _ in found], wanted, start
    )


def _one_thread() -> Any:
    return torch.autograd.set_multithreading_enabled(False)


class _NoSwaps(TorchFunctionMode):
    """Tensors given other values by `x.data = y` are not seen by those who write operators down."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__set__" and func.__self__ is torch.Tensor.data:
            raise NotRecordable("it assigns to the `data` of a tensor")
        return func(*args, **(kwargs or {}))


def _contributions(y: Tensor, inputs: Sequence[Tensor], tangent: Tensor) -> list[tuple[int, Tensor]]:
    """(number of the input, a part of its gradient), in the order in which autograd adds them up."""
    wanted = [x for x in inputs if x.requires_grad]
    ends = {torch.autograd.graph.get_gradient_edge(x).node: i for i, x in enumerate(inputs) if x.requires_grad}
    found: list[tuple[int, Tensor]] = []
    seen: set[Any] = set()
    todo: list[Any] = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [following for following, _ in node.next_functions]
        places = [(place, ends[end]) for place, end in enumerate(before) if end in ends]
        if places:
            node.register_hook(_listing(places, found))
        todo.extend(before)
    torch.autograd.grad(y, wanted, tangent, allow_unused=True)
    return found


def _listing(places: list[tuple[int, int]], found: list[tuple[int, Tensor]]) -> Any:
    def hook(gradients: Any, unused: Any) -> None:
        found.extend((number, gradients[place]) for place, number in places if gradients[place] is not None)

    return hook


class _Listing:
    """What was written down, cut in two."""

    def __init__(self, written: _Written, changeable: frozenset[int]) -> None:
        self.written, self.changeable = written, changeable
        self.inputs, self.ours, self.gradients = written.inputs, written.outputs, written.gradients
        self.cotangent = None if written.cotangent is None else written.cotangent[0]
        nodes = [*written.graph.nodes]
        cut = len(nodes) if self.cotangent is None else nodes.index(self.cotangent)
        self.before, self.after = nodes[len(self.inputs) : cut], nodes[cut + 1 :]
        self.place = {node: i for i, node in enumerate(nodes)}

    def program(self, call: Callable[[fx.GraphModule], Boxed]) -> Program:
        self._simplify()
        written = self._check()
        self.before, self.after = overlapped(self.before), overlapped(self.after)
        late = set(self.after)
        used = {node for one in self.after for node in one.all_input_nodes} | {*self.gradients}
        kept = sorted((x for x in used if x not in late and x is not self.cotangent), key=self.place.__getitem__)
        constants = [x for x in kept if x.op == "get_attr"]
        needed = [x for x in kept if x.op == "placeholder"]
        saved = [x for x in kept if x.op == "call_function"]
        if not all(isinstance(x.meta.get("val"), Tensor) for x in saved):
            raise NotRecordable("its backward needs what is no tensor of its forward")
        forward = self._module(self.inputs, self.before, [*self.ours, *saved])
        backward = None
        if self.gradients and self.cotangent is not None:
            backward = self._module([*needed, *saved, self.cotangent], [*constants, *self.after], self.gradients)
        number = {node: i for i, node in enumerate(self.inputs)}
        return Program(
            forward=call(forward),
            backward=None if backward is None else call(backward),
            outputs=len(self.ours),
            differentiable=next(iter(self.written.differentiable), None),
            needed=tuple(number[x] for x in needed),
            saved=tuple(x.name for x in saved),
            slots=tuple(self.written.slots),
            changed=tuple(sorted(number[x] for x in written)),
            watched=(sharing(self.inputs, saved), sharing(self.ours, saved)),
            cotangent=None if self.written.cotangent is None else self.written.cotangent[1],
            crossings=(crossings(self.before), crossings(self.after)),
        )

    def _simplify(self) -> None:
        """Leave out what does nothing: constants need no copies that nobody changes, and `detach` is for autograd."""
        written = {storage(x) for node in (*self.before, *self.after) for x in changed(node)}
        for nodes in (self.before, self.after):
            for node in [*nodes]:
                if node.target is _aten.lift_fresh.default and storage(node) in written:
                    node.target = _aten.clone.default
                elif node.target in (*_SAME, _aten.lift_fresh.default):
                    source = node.args[0]
                    node.replace_all_uses_with(source)
                    self.ours, self.gradients = (
                        [source if x is node else x for x in listed] for listed in (self.ours, self.gradients)
                    )
                    nodes.remove(node)

    def _check(self) -> set[fx.Node]:
        """The inputs that are changed."""
        memory = {storage(x): x for x in self.inputs}
        written = {memory[key] for node in self.before for x in changed(node) if (key := storage(x)) in memory}
        if any(self.inputs.index(x) not in self.changeable for x in written):
            raise NotRecordable("it changes a tensor in place that is no buffer")
        if any(storage(x) in memory for node in self.after for x in changed(node)):
            raise NotRecordable("its backward changes a buffer (a checkpoint of layers with buffers, perhaps)")
        if any(draws(node) for node in self.after):
            raise NotRecordable("its backward draws random numbers (a checkpoint of layers with dropout, perhaps)")
        if any(node.target is _aten.as_strided.default for node in (*self.before, *self.after)):
            raise NotRecordable("it counts strides in memory")
        constants = {storage(x) for x in self.before if x.op == "get_attr"}
        places = [storage(x) for x in self.ours]
        if len(set(places)) < len(places) or any(place in memory or place in constants for place in places):
            raise NotRecordable("what it returns is, or shares memory with, what it was given, or returns besides")
        return written

    def _module(self, inputs: list[fx.Node], nodes: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            made[node] = graph.placeholder(node.name)
            made[node].meta = dict(node.meta)
        for node in nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[node] for node in outputs))
        _drop_unused(graph)
        return fx.GraphModule(self.written.constants, graph)


def _called(module: fx.GraphModule) -> Boxed:
    """The graph as Python code that calls one operator after another, and lets go of each tensor after its last use."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta.clear()
        if node.op == "call_function":
            made[node].target = wire.CALLS.get(node.target, node.target)
    return boxed(graph, module).forward


def _compiled(module: fx.GraphModule) -> Boxed:
    """The graph compiled by torch's inductor: the same to rounding. Random numbers are those of eager code."""
    given = [node.meta["val"].detach() for node in module.graph.nodes if node.op == "placeholder"]
    wire.keep_order()
    run = inductor(module, given)
    return lambda tensors: run(*tensors)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed([*graph.nodes]):
        if node.op in ("call_function", "get_attr") and not node.users and not has_effect(node):
            graph.erase_node(node)
