"""One device, many slices: a model that does not fit runs on latitude slices that take turns, with the same numbers.

    with slices(model, 8):
        y = model(x)              # whole fields in, whole fields out; with gradients, if there are any
        y.square().mean().backward()

Each slice is a rank (`thread_ranks`) that runs to its next exchange. What it has made then rests elsewhere until it is
needed (`parking`), saved tensors of autograd too. Parameters are held once. The gradient of a parameter is the sum of
the slices' parts in their order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from credit.domain_parallel.containers import closed, opened
from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.generators import Generators
from credit.domain_parallel.hooks import MODULE_HOOKS, refuse_parameter_hooks
from credit.domain_parallel.layers import DomainParallelRoot
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager, get_domain_parallel_manager
from credit.domain_parallel.parking import Parking, place_for
from credit.domain_parallel.partition import Partition, PartitionError
from credit.domain_parallel.root import Border
from credit.domain_parallel.side_doors import make_attributes_whole
from credit.domain_parallel.thread_ranks import RankError, ThreadWorld
from credit.domain_parallel.torch_private import dispatch_modes, tree_flatten, tree_unflatten


def slices(
    model: nn.Module,
    number: int,
    *,
    shard_dim: int = -2,
    custom_converters: Mapping[Any, Converter] | None = None,
    fallback: Literal["gather", "refuse"] = "gather",
    parking: Parking | None = None,
) -> Sliced:
    """From now on, or as a context while that lasts, `model` runs on `number` slices that take turns on its device, and
    gives what it gives alone.

    On a GPU what waits rests in the host's memory; on a CPU, in a file without a name in TMPDIR. A second derivative
    is refused by torch. Buffers, numbers that a forward counts and the random generators end as after a plain forward.

    Args:
        model: a plain model, on one device.
        number: of slices; fields must have as many rows.
        shard_dim, custom_converters, fallback: as in `convert_to_domain_parallel`.
        parking: counts and moves what slices make; a new one by default.

    Returns:
        A context, of the parking: `peak` is the most bytes that slices had on the device at once, outputs included.

    Raises:
        DomainParallelError: if the model is converted already; in a forward, what its conversion would refuse.
        PartitionError: in a forward, if a field has fewer rows than there are slices.
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"a model runs on one slice at least, and on whole ones, not {number!r}")
    if number > 1 and (isinstance(model, DomainParallelRoot) or "forward" in vars(model)):
        raise DomainParallelError("slices take the plain model: this one is converted, or sliced, already")
    if parking is None:
        parking = Parking(place_for(next((p.device for p in model.parameters()), torch.device("cpu"))))

    def convert(part: nn.Module, manager: DomainParallelManager) -> nn.Module:
        return convert_to_domain_parallel(part, manager, shard_dim, custom_converters, fallback)

    sliced = Sliced(model, number, convert, shard_dim, parking)
    if number > 1:
        vars(model)["forward"] = sliced
    return sliced


class _SliceBorder(Border):
    """Gives what leaves as leaves, the length of the whole of each that is cut, and their structure."""

    def answer_hooks(self, root: nn.Module) -> None:
        refuse_parameter_hooks(root)

    def leave(self, output: Any, of: str = "a model on slices") -> tuple[list[Any], list[int | None], Any]:
        leaves, structure = tree_flatten(opened(output, of))
        left = [self.left(x) for x in leaves]
        return [x for x, _ in left], [length for _, length in left], structure


@dataclass(frozen=True)
class Sliced:
    """The forward of `model` on slices; see `slices`."""

    model: nn.Module
    number: int
    convert: Callable[[nn.Module, DomainParallelManager], nn.Module]
    shard_dim: int
    parking: Parking

    def __enter__(self) -> Parking:
        return self.parking

    def __exit__(self, *error: object) -> None:
        if vars(self.model).get("forward") is self:
            del vars(self.model)["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten(opened((args, kwargs), type(self.model).__name__))
        call = _Forward(self, leaves, structure)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if torch.is_grad_enabled() and (trained or inputs):
            outputs = _OnSlices.apply(call, trained, *inputs, *trained)
        else:
            outputs = call.run()
        return closed(tree_unflatten([*outputs], call.structure))

    def __reduce__(self) -> Any:
        """Refuses copies, and pickles: their forward would be that of the model that is on slices."""
        raise DomainParallelError(
            f"{type(self.model).__name__} is on slices: save its state_dict, or copy the model outside of `with slices`"
        )

    def run(self, world: ThreadWorld, function: Callable[[], None]) -> None:
        """function() on every slice, in the caller's modes."""
        modes = [mode for mode in dispatch_modes() if hasattr(mode, "of_slice")]
        kinds = {"cpu", *(p.device.type for p in self.model.parameters())} - {"meta"}
        casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

        def on_slice() -> None:
            with ExitStack() as stack:
                for cast in casts:
                    stack.enter_context(torch.autocast(*cast))
                stack.enter_context(self.parking.watching())
                for mode in modes:
                    stack.enter_context(mode.of_slice(world.rank))
                function()

        try:
            world.run(on_slice)
        except RankError as error:
            self.parking.fetch_all()
            if error.alike is not None:
                raise error.alike from None
            raise

    def part(self) -> nn.Module:
        """A copy of the model for one slice, with the model's own parameters."""
        memo: dict[int, Any] = {id(p): p for p in self.model.parameters()}
        memo.update({id(b): b.detach().clone() for b in self.model.buffers()})
        memo[id(self)] = None
        try:
            part = copy.deepcopy(self.model, memo)
        except (RuntimeError, TypeError) as error:
            name = type(self.model).__name__
            raise DomainParallelError(f"{name}: slices work on copies, and this cannot be copied: {error}") from None
        del vars(part)["forward"]
        for name in MODULE_HOOKS:  # they are called around the whole
            getattr(part, name).clear()
        return part

    @torch.no_grad()
    def take_over(self, part: nn.Module, before: dict[str, dict[str, Any]]) -> None:
        """Buffers, and numbers and tensors among the attributes, as a forward of `part` has left them."""
        of_model = dict(self.model.named_modules())
        for path, theirs in part.named_modules():
            ours = of_model.get(path)
            if ours is None:
                continue
            for name, buffer in theirs._buffers.items():
                held = ours._buffers.get(name)
                if buffer is not None and held is not None and held.shape == buffer.shape:
                    held.copy_(buffer)
                elif buffer is not None:
                    self.parking.keep(buffer)
                    ours._buffers[name] = buffer
            for name, value in vars(theirs).items():
                if isinstance(value, Tensor) and value is not before.get(path, {}).get(name):
                    self.parking.keep(value)
                    setattr(ours, name, value)
                elif isinstance(value, int | float) and value != before.get(path, {}).get(name, value):
                    setattr(ours, name, value)


@dataclass
class _Graph:
    """A slice's forward, for its backward: the inputs that have gradients, and the outputs."""

    inputs: list[Tensor]
    outputs: list[Tensor | None]


class _Input(NamedTuple):
    """One of the tensors that a model is given and that have gradients; `length` of the axis that is cut."""

    like: Tensor
    length: int | None


class _Forward:
    """One forward on slices.

    Attributes:
        graphs: by slice, if gradients are wanted.
        inputs: those that have gradients.
        cut: of each output, the length of the whole along the axis that is cut; None for what is whole.
        structure: of what the model gives.
    """

    def __init__(self, sliced: Sliced, leaves: list[Any], structure: Any) -> None:
        self.sliced = sliced
        self.world = ThreadWorld(sliced.number, sliced.parking.park)
        self._leaves, self._given = leaves, structure
        self._outputs: list[Any] = []
        self._end: Generators | None = None
        self.graphs: dict[int, _Graph] = {}
        self.cut: list[int | None] = []
        self.structure: Any = None
        tensors = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        self.inputs = [_Input(x.detach().to("meta"), self._length(x)) for x in tensors]

    def run(self) -> list[Any]:
        """The outputs, whole."""
        self.sliced.run(self.world, self._on_slice)
        assert self._end is not None
        ours = Generators()
        ours.stand_where(self._end)
        ours.restore()
        outputs, self._outputs, self._leaves = self._outputs, [], []  # the graph of what is given holds this
        return outputs

    def _on_slice(self) -> None:
        rank, sliced = self.world.rank, self.sliced
        manager = get_domain_parallel_manager()
        assert manager is not None
        part = sliced.part()
        model = sliced.convert(part, manager)
        before = {path: dict(vars(module)) for path, module in part.named_modules()}
        border = vars(model)["_domain_border"]
        vars(model)["_domain_border"] = _SliceBorder(manager, border.shard_dim, border.fallback)
        given = [self._rows_of(x, rank) if isinstance(x, Tensor) else x for x in self._leaves]
        versions = [x._version for x in given if isinstance(x, Tensor)]
        args, kwargs = closed(tree_unflatten(given, self._given))
        outputs, cut, structure = model(*args, **kwargs)
        if versions != [x._version for x in given if isinstance(x, Tensor)]:
            raise DomainParallelError(
                f"{type(sliced.model).__name__} changes in place what it is given, and slices have copies of that: "
                f"clone it first in the forward"
            )
        make_attributes_whole(part, before)
        self._gather(outputs, cut, structure, rank)
        if torch.is_grad_enabled():
            inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
            tensors = [x if isinstance(x, Tensor) and x.requires_grad else None for x in outputs]
            self.graphs[rank] = _Graph(inputs, tensors)
        if rank == 0:
            sliced.take_over(part, before)
            self._end = Generators()

    @torch.no_grad()
    def _gather(self, outputs: list[Any], cut: list[int | None], structure: Any, rank: int) -> None:
        if not self.cut:
            self._outputs, self.cut, self.structure = [*map(self._empty, outputs, cut)], cut, structure
        for whole, mine, length in zip(self._outputs, outputs, cut, strict=True):
            if isinstance(mine, Tensor) and (length is not None or rank == 0):
                self.narrowed(whole, length, rank).copy_(mine)

    def _length(self, x: Tensor) -> int | None:
        return x.shape[self.sliced.shard_dim] if x.ndim >= 2 - self.sliced.shard_dim else None

    def _rows_of(self, x: Tensor, rank: int) -> Tensor:
        """A slice's own copy of its rows, or of what is whole."""
        length = self._length(x)
        if length is not None and length < self.world.size:
            raise PartitionError(f"cannot cut {length} rows into {self.world.size} slices")
        mine = self.narrowed(x.detach(), length, rank).clone()
        return mine.requires_grad_(x.requires_grad and torch.is_grad_enabled())

    def narrowed(self, x: Tensor, length: int | None, rank: int) -> Tensor:
        """The slice's rows of a whole tensor."""
        if length is None:
            return x
        rows = Partition(length, self.world.size).range(rank)
        return x.narrow(self.sliced.shard_dim, rows.start, len(rows))

    def _empty(self, x: Any, length: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [*x.shape]
        if length is not None:
            shape[self.sliced.shard_dim] = length
        return self.kept(torch.empty(shape, dtype=x.dtype, device=x.device))

    def kept(self, x: Tensor) -> Tensor:
        """`x`, which stays on the device."""
        self.sliced.parking.keep(x)
        return x


class _Backward:
    """The backward of a forward on slices.

    Attributes:
        of_inputs, of_parameters: the gradients, None where there are none.
    """

    def __init__(self, forward: _Forward, trained: list[Tensor], cotangents: Sequence[Tensor | None]) -> None:
        self._forward, self._trained, self._cotangents = forward, trained, cotangents
        self._parts: dict[int, list[Tensor | None]] = {}
        self._added = 0
        self.of_inputs: list[Tensor | None] = [None] * len(forward.inputs)
        self.of_parameters: list[Tensor | None] = [None] * len(trained)

    def run(self) -> None:
        forward = self._forward
        if not forward.graphs:
            raise DomainParallelError("a second backward of one forward on slices: what they saved is used up")
        forward.sliced.run(forward.world, self._on_slice)

    def _on_slice(self) -> None:
        rank, forward = self._forward.world.rank, self._forward
        graph = forward.graphs.pop(rank)
        pairs = [
            (y, forward.narrowed(cotangent, length, rank).clone())
            for y, cotangent, length in zip(graph.outputs, self._cotangents, forward.cut, strict=True)
            if y is not None and cotangent is not None
        ]
        wanted = [*graph.inputs, *self._trained]
        found = torch.autograd.grad([y for y, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        del graph, pairs, wanted
        parts: list[Tensor | None] = [*found]
        for i, (like, length) in enumerate(forward.inputs):
            part = parts[i]
            if length is not None and part is not None:
                self._place(i, part, like, rank)
                parts[i] = None
        self._parts[rank] = parts
        del found, parts
        while self._added in self._parts:  # in the order of the slices, whichever is done first
            self._add(self._parts.pop(self._added))
            self._added += 1

    def _place(self, i: int, part: Tensor, like: Tensor, rank: int) -> None:
        if self.of_inputs[i] is None:
            self.of_inputs[i] = self._forward.kept(torch.zeros_like(like, device=part.device))
        self._forward.narrowed(self.of_inputs[i], self._forward.inputs[i].length, rank).copy_(part)  # type: ignore[arg-type]

    def _add(self, parts: list[Tensor | None]) -> None:
        inputs = len(self.of_inputs)
        for i in range(len(parts)):
            part, parts[i] = parts[i], None  # so that one is here at a time
            totals, at = (self.of_inputs, i) if i < inputs else (self.of_parameters, i - inputs)
            total = totals[at]
            if part is not None and total is None:
                totals[at] = self._forward.kept(part.clone())
            elif part is not None and total is not None:
                total.add_(part)


class _OnSlices(torch.autograd.Function):
    """Makes of a forward on slices one node of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Forward, trained: list[Tensor], *tensors: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            outputs = call.run()
        graphs = call.graphs.values()
        fixed = [
            y
            for i, y in enumerate(outputs)
            if isinstance(y, Tensor) and all(graph.outputs[i] is None for graph in graphs)
        ]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.trained = call, trained
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = _Backward(ctx.call, ctx.trained, cotangents)
        backward.run()
        return None, None, *backward.of_inputs, *backward.of_parameters
