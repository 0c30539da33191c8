"""Is the sharded model the plain one? Both are run, all they give is compared, and where they part is named."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from credit.domain_parallel.containers import closed, opened
from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.gathered import gathers_recorded
from credit.domain_parallel.generators import seed_torch
from credit.domain_parallel.layers import DomainParallelLayer, DomainParallelRoot
from credit.domain_parallel.lengths import gather_numbers
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager, get_domain_parallel_manager
from credit.domain_parallel.parity_report import Key, Pairs, ParityReport, pair_of, pairs_of, relative
from credit.domain_parallel.partition import PartitionError
from credit.domain_parallel.reshard import AllSum, own, whole
from credit.domain_parallel.root import Border
from credit.domain_parallel.sharding import shard_tensor
from credit.domain_parallel.slab import Slab, name_of, observed
from credit.domain_parallel.thread_ranks import RankError, ThreadWorld, thread_ranks
from credit.domain_parallel.torch_private import tree_flatten, tree_leaves, tree_unflatten

THREADS = 3
"""Ranks to be made where none are there: with fewer none has two neighbours."""

Convert = Callable[[nn.Module, DomainParallelManager], nn.Module]


def _manager_of(
    manager: DomainParallelManager | None, ranks: int | None, cut: Cut | None
) -> DomainParallelManager | None:
    """The manager whose ranks compare, or None if threads are to."""
    if ranks is not None and manager is not None:
        raise ValueError("give verify_parity a manager, whose ranks are there, or a number of ranks to be made")
    if ranks is None:
        manager = manager or get_domain_parallel_manager()
    if manager is None and cut is not None:
        raise ValueError("a cut is over ranks that are there: give verify_parity their manager too")
    return manager


def verify_parity(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    manager: DomainParallelManager | None = None,
    *,
    shard_dim: int = -2,
    kwargs: dict[str, Any] | None = None,
    custom_converters: Mapping[Any, Converter] | None = None,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    cut: Cut | None = None,
    ranks: int | None = None,
    fallback: Literal["gather", "refuse"] = "gather",
) -> ParityReport:
    """Compare `model` converted, on shards, with `model` on whole fields.

    Without a manager, threads of this process are the ranks; otherwise every domain rank of the manager calls this.
    Compared are outputs, gradients of inputs and of parameters under random cotangents, and buffers afterwards. All
    work is done on copies in `dtype`, `model` and the random generators stay as they are. In the copies, trainable
    parameters that are all zero are drawn at random: a head that starts as the zero map would hide all before it.
    A process runs the whole model once, and holds its activations for that time; ranks that are threads share the run.

    Args:
        model: the plain model, the same on every domain rank, in the mode (train or eval) to be checked.
        example_inputs: what to call it with: the same whole fields on every domain rank, of any floating type.
        manager: of the domain group; the global one by default. On one rank the plain model is run twice.
        shard_dim: as in `convert_to_domain_parallel`, like `custom_converters` and `fallback`.
        kwargs: more of them, by name.
        tolerance: the largest error that counts as exact; see `ParityReport.errors`.
        seed: of what the model draws, and of the cotangents.
        cut: what else is done to the sharded model, before it is converted; over ranks that have a manager.
        ranks: how many domain ranks to make, in place of a manager; 3 where there is none.

    Raises:
        ValueError: if both a manager and a number of ranks are given, or a cut without a manager.
        DomainParallelError: on every rank, if the model has something that is refused, is converted already, cannot be
            copied, gives no tensors, or is not the same on all domain ranks, or its inputs are not.
        PartitionError: if an input has fewer rows than there are domain ranks.
    """
    manager = _manager_of(manager, ranks, cut)
    convert = partial(
        convert_to_domain_parallel, shard_dim=shard_dim, custom_converters=custom_converters, fallback=fallback
    )
    found = _comparison(model, example_inputs, kwargs, convert, shard_dim, dtype, tolerance, seed)
    if manager is None:
        return _on_threads(found, ranks or THREADS, lambda world: Place(DomainParallelManager.of_group(world.group())))
    _refuse_differences(model, tree_leaves(opened((example_inputs, kwargs or {}))), manager)
    with _generators_kept():
        return found.report(Place(manager, cut))


def verify_parity_at(
    places: Callable[[ThreadWorld], Place],
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    ranks: int,
    custom_converters: Mapping[Any, Converter] | None = None,
    fallback: Literal["gather", "refuse"] = "gather",
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> ParityReport:
    """`verify_parity` on `ranks` threads that make up several groups.

    Args:
        places: called on every rank: where its part of the model runs.
    """
    convert = partial(convert_to_domain_parallel, custom_converters=custom_converters, fallback=fallback)
    found = _comparison(model, example_inputs, None, convert, -2, dtype, tolerance, seed)
    return _on_threads(found, ranks, places)


def _on_threads(comparison: _Comparison, ranks: int, places: Callable[[ThreadWorld], Place]) -> ParityReport:
    """The plain model is run once, and its results are shared."""
    with _generators_kept(), thread_ranks(ranks) as world:
        _ = comparison.expected  # found before ranks take turns
        try:
            return world.run(lambda: comparison.report(places(world)))[0]
        except RankError as error:
            if isinstance(error.alike, DomainParallelError | PartitionError):
                raise error.alike from None
            raise


def _generators_kept() -> Any:
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _comparison(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    convert: Convert,
    shard_dim: int,
    dtype: torch.dtype,
    tolerance: float,
    seed: int,
) -> _Comparison:
    if any(isinstance(module, DomainParallelLayer | DomainParallelRoot) for module in model.modules()):
        raise DomainParallelError("verify_parity takes the plain model, and converts a copy: this one is converted")
    leaves, structure = tree_flatten(opened((example_inputs, kwargs or {})))
    leaves = [_cast(x.detach(), dtype) if isinstance(x, Tensor) else x for x in leaves]
    prepared = _prepared(model, dtype, seed)
    return _Comparison(prepared, leaves, structure, convert, shard_dim, dtype, tolerance, seed)


class Cut(Protocol):
    """Another way in which a model is sharded, such as tensor parallelism."""

    def apply(self, model: nn.Module) -> nn.Module: ...

    def whole(self, model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's gradients, from those by name of a rank."""


@dataclass(frozen=True)
class Place:
    """Where one rank's part of a sharded model runs.

    Attributes:
        manager: of the domain group.
        cut: what else is done to the model, before it is converted.
    """

    manager: DomainParallelManager
    cut: Cut | None = None


class _Run:
    """A model that was run forward on `leaves` of (args, kwargs)."""

    def __init__(self, model: nn.Module, leaves: list[Any], structure: Any, seed: int) -> None:
        self.model = model
        self.inputs = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        # A model may change in place what it is given, which autograd forbids of leaves.
        given = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = closed(tree_unflatten(given, structure))
        seed_torch(seed)
        self.outputs = _tensors(opened(model(*args, **kwargs)))

    def backward(self, cotangents: list[Tensor]) -> None:
        pairs = [pair for pair in zip(self.outputs, cotangents, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [cotangent for _, cotangent in pairs])

    def input_gradients(self) -> dict[int, Tensor]:
        return {i: _gradient(x) for i, x in self.inputs.items() if x.requires_grad}

    def parameter_gradients(self) -> dict[str, Tensor]:
        return {name: _gradient(parameter) for name, parameter in self.model.named_parameters()}


class _Expected:
    """What the plain model gives, whole; found once."""

    def __init__(self, run: _Run, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cotangents = [_random(y, generator) for y in run.outputs]
        run.backward(self.cotangents)
        self.outputs = [y.detach() for y in run.outputs]
        self.input_gradients, self.parameter_gradients = run.input_gradients(), run.parameter_gradients()
        self.buffers = dict(run.model.named_buffers())


@dataclass
class _Comparison:
    """What the two models are made from, and run on."""

    model: nn.Module
    leaves: list[Any]
    structure: Any
    convert: Convert
    shard_dim: int
    dtype: torch.dtype
    tolerance: float
    seed: int

    @cached_property
    def expected(self) -> _Expected:
        run = self.run(None)
        if not run.outputs:
            raise DomainParallelError(f"{type(self.model).__name__} gives no tensors: there is nothing to compare")
        return _Expected(run, self.seed)

    @cached_property
    def expected_of_modules(self) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        self.run(None, see=lambda key, output: found.update({key: output.detach().clone()}))
        return found

    def run(self, place: Place | None, see: Callable[[Key, Tensor], None] | None = None) -> _Run:
        """A new copy of the model, plain or at a place, run forward; `see` is given what its modules give."""
        model = copy.deepcopy(self.model)
        enter = _with_gradient
        if place is not None:
            model = model if place.cut is None else place.cut.apply(model)
            model = self.convert(model, place.manager)
            border = self.border(place)

            def enter(x: Tensor) -> Tensor:
                return _with_gradient(shard_tensor(x, self.shard_dim, place.manager) if border.is_field(x) else x)

        if see is not None:
            _watch(model, see)
        leaves = [enter(x) if isinstance(x, Tensor) else x for x in self.leaves]
        return _Run(model, leaves, self.structure, self.seed)

    def border(self, place: Place) -> Border:
        return Border(place.manager, self.shard_dim)

    def report(self, place: Place) -> ParityReport:
        """Of the sharded model whose part at `place` this is. Called by all ranks."""
        with gathers_recorded() as gathers:
            errors, calls = self.compare(place)
        gathered = tuple(map(str, gathers))
        report = ParityReport(
            place.manager.domain_world_size, self.dtype, self.tolerance, errors, calls, gathered=gathered
        )
        if report.exact:
            return report
        first, first_error = self.first_departure(place)
        return dataclasses.replace(report, first=first, first_error=first_error)

    def compare(self, place: Place) -> tuple[dict[str, float], dict[str, int]]:
        """Errors by kind and name, and the torch functions that met slabs."""
        expected, border = self.expected, self.border(place)
        calls: Counter[str] = Counter()
        with observed(lambda function: calls.update([name_of(function)])):
            sharded = self.run(place)
            pairs = pairs_of("output", enumerate(sharded.outputs), enumerate(map(border.leave, expected.outputs)))
            # No cotangent fits an output of another shape, and a NaN leaves nothing to compare.
            if all(map(math.isfinite, self.errors(pairs, place).values())):
                sharded.backward([border.leave(cotangent) for cotangent in expected.cotangents])
                pairs |= self.gradients(sharded, place)
        ours = {name: whole(buffer) for name, buffer in sharded.model.named_buffers()}
        pairs |= pairs_of("buffer", ours.items(), expected.buffers.items())
        return {" ".join(key): error for key, error in self.errors(pairs, place).items()}, dict(calls)

    def gradients(self, sharded: _Run, place: Place) -> Pairs:
        """Rows of the gradients of fields; of what is whole, the sum of the ranks' parts."""
        border, expected = self.border(place), self.expected

        def total(x: Tensor) -> Tensor:
            return AllSum.apply(x, border.group)

        ours = {i: x if border.is_field(x) else total(x) for i, x in sharded.input_gradients().items()}
        theirs = {i: border.leave(x) if border.is_field(x) else x for i, x in expected.input_gradients.items()}
        parameters = sharded.parameter_gradients()
        if place.cut is not None:
            parameters = place.cut.whole(sharded.model, parameters)
        totals = {name: total(gradient) for name, gradient in parameters.items()}
        return pairs_of("input gradient", ours.items(), theirs.items()) | pairs_of(
            "parameter gradient", totals.items(), expected.parameter_gradients.items()
        )

    def first_departure(self, place: Place) -> tuple[str, float] | tuple[None, None]:
        """The first module, in order of execution, whose output is off by more than tolerated, and by how much."""
        expected, border = self.expected_of_modules, self.border(place)
        pairs: Pairs = {}

        def compare(key: Key, ours: Tensor) -> None:
            if key in expected:
                pairs[key] = _module_pair(key[0], ours, expected[key], border)

        self.run(place, see=compare)
        errors = self.errors(pairs, place)
        found = ((path or type(self.model).__name__, error) for (path, _), error in errors.items())
        return next(((path, error) for path, error in found if error > self.tolerance), (None, None))

    def errors(self, pairs: Pairs, place: Place) -> dict[Key, float]:
        """What `ParityReport.errors` says, over the rows of all ranks."""
        group = place.manager.group
        table = torch.tensor([*pairs.values()], dtype=torch.float64, device=group.message_device)
        totals = dict(zip(pairs, group.all_reduce(table, "max").tolist(), strict=True))
        noise = torch.finfo(self.dtype).eps ** 0.25
        largest: dict[str, float] = {}
        for (kind, _), (_, size) in totals.items():
            largest[kind] = max(size, largest.get(kind, 0.0))
        return {key: relative(off, max(size, noise * largest[key[0]])) for key, (off, size) in totals.items()}


def _module_pair(path: str, ours: Tensor, theirs: Tensor, border: Border) -> tuple[float, float]:
    """Of what the module at `path` gave."""
    if not path:
        return pair_of(ours, border.leave(theirs))
    if type(ours) is Slab:
        return pair_of(ours.local, own(theirs, ours.cut, ours)) if ours.shape == theirs.shape else (math.inf, 0.0)
    if isinstance(ours, Slab):  # of another kind, within a block: what the block gives is compared
        return 0.0, 0.0
    # Rows that a custom converter's module gives to its children have no counterpart.
    return pair_of(ours, theirs) if ours.shape == theirs.shape else (0.0, 0.0)


def _refuse_differences(model: nn.Module, leaves: list[Any], manager: DomainParallelManager) -> None:
    if manager.domain_world_size == 1:
        return
    modes = torch.tensor([module.training for module in model.modules()])
    numbers = [_digest([modes, *model.parameters(), *model.buffers()]), _digest(leaves)]
    columns = zip(*gather_numbers(numbers, manager.group), strict=True)
    for what, column in zip(("weights, buffers or modes", "example inputs"), columns, strict=True):
        odd = [rank for rank, number in enumerate(column) if number != column[0]]
        if odd:
            raise DomainParallelError(
                f"{type(model).__name__}: the {what} on domain ranks {odd} differ from domain rank 0's. Parity is that "
                f"of one model with one input: seed all ranks alike, or load one checkpoint"
            )


def _digest(values: Iterable[Any]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for x in values:
        if isinstance(x, Tensor):
            digest.update(f"{list(x.shape)} {x.dtype}".encode())
            digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _prepared(model: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    try:
        model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        name = type(model).__name__
        raise DomainParallelError(f"{name}: parity is checked on copies, and this cannot be copied: {error}") from None
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _cast(tensor.data, dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data = 0.1 * _random(parameter, generator)
    return model


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not _has_gradient(x):
        return x
    return x.to(dtype.to_complex() if x.is_complex() else dtype)


def _with_gradient(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(_has_gradient(x))


def _has_gradient(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, the same on every device."""
    dtype = like.dtype if _has_gradient(like) else torch.float64
    return torch.randn(like.shape, dtype=dtype, generator=generator).to(like.device)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in what a module gives, dataclasses included."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value, is_leaf=lambda x: isinstance(x, Slab)):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def _watch(model: nn.Module, see: Callable[[Key, Tensor], None]) -> None:
    """Call `see` with every tensor that a module of `model` gives: the module's path, and which call and tensor."""
    calls: Counter[str] = Counter()

    def hook_of(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[path] += 1
            for i, tensor in enumerate(_tensors(output)):
                see((path, f"{calls[path]} {i}"), tensor)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(hook_of(path))
