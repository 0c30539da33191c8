"""A converted model's forward and backward, recorded at its second call of a kind and replayed from then on.

Inside a converted model every torch function goes through Python. For given shapes what comes of that is always the
same list of operators and messages; it is written down once (see `program`), and replayed it gives the same bits and
the same bytes on the wire without any of that. The loss, a rollout, DDP and the optimiser stay outside.

What cannot be recorded runs eagerly, which is said once, with the reason. A rank replays if every rank of its domain
group can: they tell each other in the message that each forward begins with. (Were they of different minds, in another
group say, they would understand each other all the same: the messages are the same ones.)
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit.domain_parallel import program
from credit.domain_parallel.autocast import NONE, Autocast, casts_of_its_own
from credit.domain_parallel.containers import _Opened, flattened, restored
from credit.domain_parallel.groups import RankGroup
from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.modules_state import ModulesChanged, ModulesState
from credit.domain_parallel.overlap import Crossing
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.program import Given, Layout, NotRecordable, Program
from credit.domain_parallel.slab import Slab, class_name
from credit.domain_parallel.torch_private_recording import (
    TreeSpec,
    below_autograd,
    modes_see_calls,
    takes_forward_derivatives,
)

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 16
"""Kinds of calls of one model (shapes, modes) that are recorded, and changes of its modules that are followed."""

_PLAIN = (bool, int, float, complex, str, type(None))
_SEED = 0x6372_6564_6974
"""Not what a model would seed a generator with."""

Body = Callable[[list[Any]], Any]
"""From the leaves of the arguments, with fields as slabs, to what leaves the model."""


class Kind(NamedTuple):
    """A kind of call, as far as a rank can tell before it has heard of the others.

    Attributes:
        key: what all its calls share.
        is_ready: calls of this kind are recorded.
    """

    key: Any
    is_ready: bool


class Recorder:
    """What is recorded of one model.

    Args:
        compiled: recordings are compiled by torch's inductor: the same numbers to rounding, and fewer launches.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._states: dict[bool, ModulesState] = {}  # in training, and not
        self._recordings: dict[Any, dict[tuple[int, ...], Recording]] = {}
        self._calls: Counter[Any] = Counter()
        self._failed: set[Any] = set()
        self._changes = 0
        self._said: set[str] = set()

    # A copied model records anew.
    def __deepcopy__(self, memo: dict[str, Any]) -> Recorder:
        return Recorder(self.compiled)

    def __reduce__(self) -> Any:
        return Recorder, (self.compiled,)

    def crossings(self) -> list[Crossing]:
        """The messages of all that is recorded, and what goes on while they are under way."""
        programs = [made.program for kind in self._recordings.values() for made in kind.values()]
        return [one for made in programs for one in (*made.crossings[0], *made.crossings[1])]

    def run(self, root: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """forward(*args, **kwargs) of a model of which no rank has a part of the arguments."""
        leaves, structure = flattened((args, kwargs))
        kind = self.kind(root, leaves, structure)

        def body(leaves: list[Any]) -> Any:
            args, kwargs = restored(leaves, structure)
            with casts_of_its_own():
                return forward(*args, **kwargs)

        recording = self.found(kind, leaves) if kind is not None else None
        if recording is not None:
            return recording(leaves)
        output = body(leaves)
        if kind is not None:
            self.learn(root, kind, body, leaves)
        return output

    def kind(self, root: nn.Module, leaves: list[Any], structure: TreeSpec) -> Kind | None:
        """Of a call with these arguments; None if such calls are not recorded."""
        if self._changes > MAX_RECORDINGS:
            return None
        reason = _obstacle(root, leaves, structure)
        if reason is not None:
            self._say(root, reason)
            return None
        state = self._states.get(root.training)
        if state is not None and (reason := state.hook() or state.change()):
            self._forget(root, reason)
        key = (structure, *map(_described, leaves), *_modes(root))
        return Kind(key, key in self._recordings)

    def _forget(self, root: nn.Module, reason: str) -> None:
        self._states.clear()
        self._recordings.clear()
        self._calls.clear()
        self._failed.clear()
        self._changes += 1
        if self._changes > MAX_RECORDINGS:
            self._say(root, f"its modules have changed {self._changes} times since it was recorded ({reason})")

    def found(self, kind: Kind, leaves: list[Any]) -> Recording | None:
        """The recording of such a call, of which the global lengths are known by now."""
        return self._recordings.get(kind.key, {}).get(_lengths(leaves))

    def learn(self, root: nn.Module, kind: Kind, body: Body, leaves: list[Any]) -> None:
        """After a call that ran eagerly: record the next ones, if it was the second of its kind."""
        key = (kind.key, _lengths(leaves))
        self._calls[key] += 1
        if self._calls[key] < 2 or key in self._failed:
            return
        if sum(map(len, self._recordings.values())) >= MAX_RECORDINGS:
            self._say(root, f"{MAX_RECORDINGS} kinds of calls of it (shapes, modes) are recorded, and this is another")
            return
        try:
            state = self._states.get(root.training) or ModulesState(root)
            if reason := state.hook():
                raise NotRecordable(reason)
            made = Recording(state, body, leaves, self.compiled)
        except Exception as error:  # whatever it is, eager code will meet it too, or does not mind
            self._failed.add(key)
            self._say(root, _reason(error))
            logger.debug("not recorded", exc_info=error)
            return
        self._states[root.training] = state
        self._recordings.setdefault(kind.key, {})[key[1]] = made

    def _say(self, root: nn.Module, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            if not dist.is_initialized() or dist.get_rank() == 0:
                logger.warning("%s is not recorded and runs eagerly: %s", class_name(root), reason)


class Recording:
    """One kind of calls, recorded.

    Args:
        state: of the modules.
        body: the call.
        leaves: of the arguments that it was called with.
        compiled: see `Recorder`.
    """

    def __init__(self, state: ModulesState, body: Body, leaves: list[Any], compiled: bool) -> None:
        self._state, self._body, self._compiled = state, body, compiled
        self._leaves = [_emptied(x) for x in leaves]
        self._grad, self._autocast = torch.is_grad_enabled(), Autocast.now()
        self._structure: TreeSpec | None = None
        self._values: list[Any] = []
        self._given = [Given.of(_stored(x), x.requires_grad) for x in self._inputs(leaves)]
        self.program = self._recorded()
        self._backwards = {self.program.cotangent: self.program}

    def _recorded(self, cotangent: Layout | None = None) -> Program:
        fields = len(self._given) - len(self._state.slots)
        changeable = range(fields + self._state.parameters, len(self._given))

        def function(inputs: list[Tensor]) -> list[Tensor]:
            stack.enter_context(self._state.replaced(inputs[fields:]))
            with self._autocast.again():
                output = self._body(_filled(self._leaves, inputs[:fields]))
            values, self._structure = flattened(output)
            odd = next((x for x in values if not isinstance(x, (*_PLAIN, Tensor))), None)
            if odd is not None:
                raise NotRecordable(f"it returns a {type(odd).__name__}")
            self._values = [None if isinstance(x, Tensor) else x for x in values]
            self._tensors = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
            return [values[i] for i in self._tensors]

        with _generators_kept(), torch.set_grad_enabled(self._grad), NONE.again(), ExitStack() as stack:
            return program.record(function, self._given, changeable, cotangent, self._compiled)

    def _inputs(self, leaves: list[Any]) -> list[Tensor]:
        """This rank's parts of what is computed with: the arguments, the parameters, the buffers."""
        given = [x._local if isinstance(x, Slab) else x for x in leaves if isinstance(x, Tensor)]
        return [*given, *self._state.tensors()]

    def __call__(self, leaves: list[Any]) -> Any:
        """What the model returns."""
        inputs, made = self._inputs(leaves), self.program
        call = _Call(self, [_stored(x) for x in inputs])
        if made.backward is None:
            call.run()
        else:
            _Replay.apply(call, *[_part_of_gradient(inputs[i]) for i in made.slots])
        values = [*self._values]
        for i, x in zip(self._tensors, call.outputs, strict=True):
            values[i] = x
        assert self._structure is not None
        return restored(values, self._structure)

    def backward_for(self, cotangent: Tensor) -> program.Boxed:
        """The backward for a cotangent that is stored so: eager code may take another path for another."""
        layout = Layout.of(cotangent, Autocast.now())
        if layout not in self._backwards:
            self._backwards[layout] = made = self._recorded(layout)
            if (made.saved, made.needed, made.slots) != (self.program.saved, self.program.needed, self.program.slots):
                raise DomainParallelError(
                    f"the gradient of a recorded model has strides {layout.strides}, with which its backward needs "
                    f"what the forward did not keep: make it contiguous, or do not record the model"
                )
        found = self._backwards[layout].backward
        assert found is not None
        return found


class _Call:
    """A replay of a forward, under way."""

    def __init__(self, recording: Recording, inputs: list[Tensor]) -> None:
        self.recording, self.inputs = recording, inputs
        self.outputs: list[Tensor] = []

    def run(self) -> list[Tensor]:
        """Fill in the outputs; what the backward needs of the forward."""
        made = self.recording.program
        with _plainly():
            found = made.forward([*self.inputs])
        changed = [self.inputs[i] for i in made.changed]
        if changed:
            torch.autograd.graph.increment_version(changed)
        self.outputs = [*found[: made.outputs]]
        return [*found[made.outputs :]]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *slots: Tensor) -> Tensor:
        saved, made = call.run(), call.recording.program
        inputs, outputs = made.watched
        kept = [call.inputs[i] for i in made.needed]
        # Not needed, but watched by torch for changes in place, of which these share the memory.
        watched = [*(call.inputs[i] for i in inputs if i not in made.needed), *(call.outputs[i] for i in outputs)]
        ctx.save_for_backward(*kept, *saved, *watched)
        ctx.recording, ctx.used = call.recording, len(kept) + len(saved)
        assert made.differentiable is not None
        return call.outputs[made.differentiable]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DomainParallelError(
                "a recorded model is differentiated twice (create_graph=True), of which no more than the first is "
                "recorded: do not record it (trainer.record: false)"
            )
        needed = [*ctx.saved_tensors[: ctx.used], gradient]
        backward = ctx.recording.backward_for(gradient)
        with _plainly():
            return None, *backward(needed)


@contextmanager
def _plainly() -> Iterator[None]:
    """Operators do what they do, and nothing else: no gradients and no views are recorded, nothing is cast."""
    with below_autograd(), NONE.again():
        yield


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Random generators are afterwards where they were.

    Raises:
        NotRecordable: if they were used meanwhile, which nothing without values does.
    """
    python, of_numpy = random.getstate(), np.random.get_state()
    words = of_numpy[1].tobytes(), of_numpy[2]  # type: ignore[index]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        state = torch.default_generator.manual_seed(_SEED).get_state()
        try:
            yield
            now = np.random.get_state()
            if not torch.equal(state, torch.default_generator.get_state()):
                raise NotRecordable("it seeds a random generator in its forward")
            if random.getstate() != python or (now[1].tobytes(), now[2]) != words:  # type: ignore[index]
                raise NotRecordable("it draws random numbers from Python or numpy")
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def _obstacle(root: nn.Module, leaves: list[Any], structure: TreeSpec) -> str | None:
    """Why such a call cannot be recorded, as far as its arguments and torch's modes tell."""
    if torch.is_inference_mode_enabled():
        return "inference_mode is on; take no_grad"
    if modes_see_calls():
        return "a mode of torch sees its calls"
    if takes_forward_derivatives():
        return "derivatives are taken forward, or parametrizations are cached"
    if any(kind.__name__ == "FSDPModule" for kind in type(root).__mro__):
        return "FSDP2 gathers its parameters while it runs"
    if _holds_objects(structure):
        return "its arguments are in an object that is no tuple, list or dictionary"
    odd = next((x for x in leaves if not isinstance(x, _PLAIN) and not _is_tensor(x)), None)
    return None if odd is None else f"it is given a {type(odd).__name__}"


def _is_tensor(x: Any) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and x.device.type != "meta"
    return plain and not x.is_conj() and not x.is_neg()


def _holds_objects(structure: TreeSpec) -> bool:
    return structure.type is _Opened or any(map(_holds_objects, structure.children()))


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    return type(x), x


def _modes(root: nn.Module) -> tuple[Any, ...]:
    autocast = Autocast.now()
    return (
        root.training,
        torch.is_grad_enabled(),
        autocast,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _lengths(leaves: list[Any]) -> tuple[int, ...]:
    """Of the fields, along the axis that is cut."""
    return tuple(x.partition.length for x in leaves if isinstance(x, Slab))


def _stored(x: Tensor) -> Tensor:
    """What this rank has of a parameter."""
    return x._local_tensor if hasattr(x, "_local_tensor") else x


def _part_of_gradient(x: Any) -> Tensor:
    """`x` as an operand of its own, so that parts of its gradient are added up one by one, as in eager code."""
    return x.to_local() if hasattr(x, "to_local") else x


class _Field(NamedTuple):
    """How a slab is made of its rows."""

    cut: int
    partition: Partition
    group: RankGroup
    strides: tuple[int, ...] | None

    @classmethod
    def of(cls, x: Slab) -> _Field:
        return cls(x.cut, x.partition, x.group, x.strides)

    def slab(self, local: Tensor) -> Slab:
        made = Slab(local, self.cut, self.partition, self.group)
        made.strides = self.strides
        return made


class _Whole:
    """Stands for a whole tensor."""


def _emptied(x: Any) -> Any:
    """An argument without its values."""
    if isinstance(x, Slab):
        return _Field.of(x)
    return _Whole() if isinstance(x, Tensor) else x


def _filled(leaves: list[Any], tensors: list[Tensor]) -> list[Any]:
    """The inverse of `_emptied`."""
    rest = iter(tensors)
    return [x.slab(next(rest)) if isinstance(x, _Field) else next(rest) if isinstance(x, _Whole) else x for x in leaves]


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if isinstance(error, NotRecordable | ModulesChanged):
        return str(error)
    if name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return f"what it does next, or a shape, depends on values ({error})"
    if "convert all Tensors to FakeTensors" in str(error):
        return f"it uses a tensor that is no input, parameter or buffer: register_buffer ({str(error).splitlines()[0]})"
    return f"{name}: {str(error).splitlines()[0] if str(error) else ''}"
