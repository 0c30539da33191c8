"""torch's own database of its operators as a judge: each call of each sample, with one tensor cut over ranks.

python -m tests.domain_parallel.database --ranks 3 add conv2d     every sample of these operators
python -m tests.domain_parallel.database --ranks 3                of all
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from credit.domain_parallel.manager import DomainParallelError
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.reshard import Once, part, whole
from credit.domain_parallel.slab import Slab, inside_model
from credit.domain_parallel.thread_ranks import DeadlockError, RankError, ThreadWorld, thread_ranks
from credit.domain_parallel.whole_view import as_whole
from credit.parallel.channels import ChannelGroup, Channels

TOLERANCES = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1}


WITHOUT_VALUES = ("empty_like", "new_empty", "new_empty_strided", "empty_permuted", "empty", "empty_strided")
"""Operators that give memory as it is."""


@dataclass
class Call:
    """One way to call an operator: func(*args, **kwargs), of (args, kwargs) flattened.

    Attributes:
        first_changes: the first argument is changed in place, so that a copy of it is given.
    """

    name: str
    func: Callable
    leaves: list[Any]
    structure: Any
    first_changes: bool = False

    def run(self, leaves: list[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, self.structure)
        if self.first_changes:
            args = (args[0].clone(), *args[1:])
        torch.default_generator.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.func(*args, **kwargs)
        return [found, args[0]] if self.first_changes else found


@dataclass
class Result:
    """What a call gave: its tensors and values, and the gradients of what it was given; or what it raised."""

    values: list[Any]
    gradients: dict[int, Tensor]
    error: BaseException | None = None


def calls_of(op: OpInfo, dtype: torch.dtype) -> Iterator[Call]:
    """Every sample of the database, as a function, a method, in place and with out=."""
    with_gradients = op.supports_autograd and op.supports_dtype(dtype, "cpu")
    for number, sample in enumerate(_seeded(op.sample_inputs_func(op, "cpu", dtype, with_gradients))):
        given = (sample.input, *sample.args), sample.kwargs
        leaves, structure = tree_flatten(given)
        leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        ways: list[tuple[str, Any, bool]] = [("function", op.op, False)]
        if op.method_variant is not None and op.method_variant is not op.op:
            ways.append(("method", op.method_variant, False))
        if op.inplace_variant is not None and isinstance(sample.input, Tensor):
            ways.append(("in place", op.inplace_variant, True))
        for way, func, changes in ways:
            yield Call(f"{op.name}.{op.variant_test_name} {number} {way}", func, leaves, structure, changes)
        if op.supports_out:
            yield Call(f"{op.name}.{op.variant_test_name} {number} out", _with_out(op.op), leaves, structure)


def error_calls_of(op: OpInfo) -> Iterator[Call]:
    """Calls that torch refuses."""
    for number, given in enumerate(_seeded(op.error_inputs_func(op, "cpu"))):
        sample = given.sample_input
        leaves, structure = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        yield Call(f"{op.name} error {number}", op.op, leaves, structure)


def _seeded(samples: Iterable[Any]) -> Iterator[Any]:
    """Each drawn anew, as `op.sample_inputs` does. That looks for its test on the stack at every sample, which takes
    three times as long as judging it."""
    one = iter(samples)
    while True:
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield next(one)
        except StopIteration:
            return


def _with_out(func: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            found = func(*args, **kwargs)
            outs = [torch.zeros_like(as_whole(x)) for x in ([found] if isinstance(found, Tensor) else found)]
            return func(*args, **kwargs, out=outs[0] if isinstance(found, Tensor) else tuple(outs)), outs

    return call


def run_plain(call: Call) -> Result:
    """On one device."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in call.leaves]
    return _run(call, leaves, lambda x: x)


def run_cut(call: Call, place: int, axis: int, group: Any, kind: type[Slab] = Slab) -> Result:
    """On one of the ranks of `group`, with leaf `place` cut along `axis`, as rows or as channels are."""
    leaves: list[Any] = []
    shared = ChannelGroup(group) if kind is Channels else group
    with inside_model():
        for i, x in enumerate(call.leaves):
            if not isinstance(x, Tensor):
                leaves.append(copy.deepcopy(x) if isinstance(x, list) else x)
                continue
            if i != place:
                leaves.append(x.detach().clone().requires_grad_(x.requires_grad))
                continue
            partition = Partition(x.shape[axis], group.size)
            local = part(x.detach(), axis, partition, group.rank).clone().requires_grad_(x.requires_grad)
            slab = kind(local, axis, partition, shared)
            stored = x.detach().clone()
            slab.strides = None if stored.is_contiguous() else stored.stride()
            leaves.append(slab)

        def leave(x: Tensor) -> Tensor:
            x = _as_rows(as_whole(x), group)
            counted = kind is Slab and x.requires_grad  # what is whole beside channels has the whole cotangent
            return Once.apply(whole(x), group) if isinstance(x, Slab) or counted else x

        result = _run(call, leaves, leave)
    if result.error is None:
        slab = _as_rows(leaves[place], group)
        for i, gradient in result.gradients.items():
            if i == place:
                result.gradients[i] = whole(slab.like(gradient))
            elif kind is Slab:  # what meets channels has its gradient summed already
                result.gradients[i] = group.all_reduce(gradient.to_dense())
    return result


def _as_rows(x: Any, group: Any) -> Any:
    """A slab from channels, which never leave a block of a model; anything else as it is."""
    return Slab(x.local, x.cut, x.partition, group) if isinstance(x, Channels) else x


def _run(call: Call, leaves: list[Any], leave: Callable[[Tensor], Tensor]) -> Result:
    try:
        found = call.run(leaves)
        values = [leave(x) if isinstance(x, Tensor) else x for x in tree_leaves(found)]
        return Result([x.detach() if isinstance(x, Tensor) else x for x in values], _gradients(values, leaves))
    except (DeadlockError, DomainParallelError):
        raise
    except Exception as error:
        return Result([], {}, error)


def _gradients(values: list[Any], leaves: list[Any]) -> dict[int, Tensor]:
    """Of all that was given, under random cotangents."""
    inputs = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    inputs = {i: x._local if isinstance(x, Slab) else x for i, x in inputs.items()}
    reached = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
    if not reached or not inputs:
        return {}
    torch.default_generator.manual_seed(11)
    cotangents = [torch.randn(x.shape, dtype=x.dtype) for x in reached]  # not in the order of memory
    grads = torch.autograd.grad(reached, [*inputs.values()], cotangents, allow_unused=True)
    return {i: torch.zeros_like(x) if g is None else g for (i, x), g in zip(inputs.items(), grads, strict=True)}


def difference(ours: Result, theirs: Result, tolerance: float) -> str:
    """In words; empty if there is none."""
    if theirs.error is not None or ours.error is not None:
        if type(ours.error) is type(theirs.error):
            return ""
        return f"CRASH raises {ours.error!r:.200}, torch {theirs.error!r:.200}"
    if len(ours.values) != len(theirs.values):
        return f"WRONG gives {len(ours.values)} values, torch {len(theirs.values)}"
    for a, b in zip(ours.values, theirs.values, strict=True):
        if isinstance(b, Tensor) != isinstance(a, Tensor) or (not isinstance(b, Tensor) and not _same_value(a, b)):
            return f"WRONG gives {a!r:.100}, torch {b!r:.100}"
        if isinstance(b, Tensor) and _off(a, b) > tolerance:
            return f"WRONG output {_off(a, b):.1e} {tuple(a.shape)} {a.dtype}, torch {tuple(b.shape)} {b.dtype}"
    for i in theirs.gradients.keys() | ours.gradients.keys():
        a, b = ours.gradients.get(i), theirs.gradients.get(i)
        if a is None or b is None:
            found = a if b is None else b
            if found is not None and bool(found.count_nonzero()):
                return f"WRONG gradient of {i} is missing"
        elif _off(a, b) > tolerance:
            return f"WRONG gradient of {i}: {_off(a, b):.1e}"
    return ""


def _same_value(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (not isinstance(b, int | float | bool | str) or a == b or (a != a and b != b))


def _off(a: Tensor, b: Tensor) -> float:
    a, b = a.to_dense(), b.to_dense()
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not b.numel():
        return 0.0
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    parts = [torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x for x in (a, b)]
    if not all(torch.equal(f(parts[0]), f(parts[1])) for f in (torch.isnan, torch.isposinf, torch.isneginf)):
        return float("inf")
    a, b = (x.nan_to_num(0, 0, 0) for x in parts)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


def _nudged(call: Call) -> Call:
    """The same call with inputs that differ in their last bits."""

    def nudge(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        return (x.detach() * (1 + 4 * torch.finfo(x.dtype).eps)).requires_grad_(x.requires_grad)

    return replace(call, leaves=[nudge(x) for x in call.leaves])


def verdict(
    world: ThreadWorld,
    call: Call,
    place: int,
    axis: int,
    theirs: Result,
    tolerance: float,
    kind: type[Slab] = Slab,
) -> str:
    """ "exact", or what is not, in words. An error that rounding of the inputs makes as large on one device is none."""
    try:
        ranks = world.run(lambda: run_cut(call, place, axis, world.group(), kind))
    except RankError as error:
        causes = [*error.errors.values()]
        if all(isinstance(cause, DomainParallelError) for cause in causes) and len(causes) == world.size:
            return f"refused {str(causes[0])[:200]}"
        if any(isinstance(cause, DeadlockError) for cause in causes):
            return f"HANG {causes[0]!r:.300}"
        return f"CRASH {causes[0]!r:.300}"
    found = next((text for ours in ranks if (text := difference(ours, theirs, tolerance))), "exact")
    if found.startswith("WRONG") and difference(run_plain(_nudged(call)), theirs, tolerance):
        largest = 100 * max(0.0, *(_distance(run_plain(_nudged(call)), theirs), tolerance))
        found = next((text for ours in ranks if (text := difference(ours, theirs, largest))), "exact")
    return found


def _distance(ours: Result, theirs: Result) -> float:
    pairs = [(a, b) for a, b in zip(ours.values, theirs.values, strict=True) if isinstance(b, Tensor)]
    pairs += [(ours.gradients[i], b) for i, b in theirs.gradients.items()]
    return max((off for a, b in pairs if (off := _off(a, b)) != float("inf")), default=0.0)


def cuts_of(call: Call, ranks: int, ends: bool = False) -> Iterator[tuple[int, int]]:
    """(leaf, axis) of every tensor that can be cut; with `ends`, along its first and last axis alone."""
    for i, x in enumerate(call.leaves):
        if isinstance(x, Tensor) and x.layout is torch.strided and (x.is_floating_point() or x.is_complex()):
            for axis in range(x.ndim):
                if x.shape[axis] >= ranks and not (ends and 0 < axis < x.ndim - 1):
                    yield i, axis


def judge(
    op: OpInfo,
    world: ThreadWorld,
    dtype: torch.dtype,
    samples: int | None = None,
    seen: Callable | None = None,
    kind: type[Slab] = Slab,
) -> Counter:
    """Verdicts on an operator, counted by their first word; `seen` is called with each."""
    counts: Counter = Counter()
    kinds: Counter = Counter()
    for call in calls_of(op, dtype):
        way = call.name.split(" ", 2)[2]
        if samples is not None and kinds[way] >= samples:
            continue
        theirs = None
        for place, axis in cuts_of(call, world.size, ends=samples is not None):
            kinds[way] += axis == 0
            theirs = run_plain(call) if theirs is None else theirs
            found = verdict(world, call, place, axis, theirs, TOLERANCES[dtype], kind)
            counts[found.partition(" ")[0]] += 1
            if seen is not None:
                seen(call, place, axis, found)
    return counts


def operators(dtype: torch.dtype) -> list[OpInfo]:
    """Those of the database that run on a CPU in this type."""
    return [op for op in op_db if op.supports_dtype(dtype, "cpu") and op.name not in WITHOUT_VALUES]


def main() -> None:
    logging.getLogger("credit").setLevel(logging.ERROR)  # what is gathered is not of interest here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="operators; all by default")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of an operator and a way to call it; all by default")
    parser.add_argument("--dtype", default="float64", choices=[str(kind).removeprefix("torch.") for kind in TOLERANCES])
    parser.add_argument("--channels", action="store_true", help="cut as channels are, not as rows")
    parser.add_argument("--part", default="0/1", help="every n-th operator: i/n")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    first, step = map(int, options.part.split("/"))
    total: Counter = Counter()
    with thread_ranks(options.ranks) as world:
        for op in operators(dtype)[first::step]:
            if options.names and op.name not in options.names:
                continue
            said: set[str] = set()

            def seen(call: Call, place: int, axis: int, found: str, said: set[str] = said) -> None:
                if found != "exact" and found[:40] not in said and len(said) < 4:
                    said.add(found[:40])
                    print(f"{call.name}, leaf {place} axis {axis}: {found}", flush=True)

            counts = judge(op, world, dtype, options.samples, seen, Channels if options.channels else Slab)
            total += counts
            total["operators"] += 1
            total["operators without refusal"] += not counts["refused"]
    print(dict(total))


if __name__ == "__main__":
    main()
