"""Is the sharded model the plain one? Both are run, all they give is compared, and where they part is named."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from credit.domain_parallel import slab as slabs
from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.layers import DomainParallelLayer, DomainParallelRoot
from credit.domain_parallel.lengths import gather_numbers
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager, get_domain_parallel_manager
from credit.domain_parallel.reshard import AllSum, own, whole
from credit.domain_parallel.root import Border
from credit.domain_parallel.sharding import shard_tensor
from credit.domain_parallel.slab import Slab

KINDS = ("output", "input gradient", "parameter gradient", "buffer")
ROUNDING = 1e-4

Key = tuple[str, str]
"""Kind and name of a tensor; of a module's output, the module's path and a number."""

Pairs = dict[Key, tuple[float, float]]
"""On this rank: max |ours - theirs|, infinite if they cannot be compared, and max |theirs|."""


@dataclass(frozen=True)
class ParityReport:
    """How far the sharded model is from the plain one. The same on every domain rank.

    Attributes:
        ranks: domain ranks; on one, the plain model was compared with itself.
        dtype: what both were run in.
        tolerance: the largest error that counts as exact.
        errors: by kind and name ("output 0", "parameter gradient stem.weight"): max |a - b| / max |b|, b being the
            plain model's. Where b is zero but for rounding (the gradient of a bias before a norm), that would blow up
            noise: max |b| counts as eps ** 0.25 (1e-4 in float64) of the largest of its kind at least. If the whole
            kind is zero, anything else is infinitely wrong; so is a NaN, another shape or type, and a name that one
            model alone has. Gradients are left out if an output is infinitely wrong.
        calls: how often each torch function, by its qualified name, met a field that is cut.
        first: path of the first module, in order of execution, whose output is off by more than `tolerance`; the
            model's class if it is that of the whole model; None if every output agrees.
        first_error: by how much it is off, as in `errors`.
    """

    ranks: int
    dtype: torch.dtype
    tolerance: float
    errors: dict[str, float]
    calls: dict[str, int]
    first: str | None = None
    first_error: float | None = None

    @property
    def exact(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        ranks = f"over {self.ranks} domain ranks" if self.ranks > 1 else "on one rank (nothing is cut: plain is plain)"
        verdict = "exact" if self.exact else "NOT exact"
        lines = [f"parity {ranks}, {self.dtype}: {verdict} to {self.tolerance:g}"]
        lines.append(f"{'':18}  compared  worst error")
        for kind in KINDS:
            found = {key.removeprefix(kind): error for key, error in self.errors.items() if key.startswith(kind)}
            worst = max(found, key=lambda name: found[name], default=None)
            lines.append(f"{kind:18}  {len(found):8}  {'-' if worst is None else f'{found[worst]:.1e} {worst}'}")
        return "\n".join(lines if self.exact else [*lines, *self._advice()])

    def _advice(self) -> tuple[str, str]:
        last = [key for key, error in self.errors.items() if not error <= self.tolerance][-1]
        where = f"Every module's output agrees. The last in the model that is off: {last}. Look there and right after."
        if self.first is not None:
            where = f"They part first at {self.first}, whose output is off by {self.first_error:.1e}."
            if self.first_error == math.inf:
                where += " Infinite is a NaN, or another shape or type."
        if max(self.errors.values()) < ROUNDING:
            return where, "So small an error is rounding in a narrower type: look for .float() or autocast there."
        return where, (
            "If a custom converter made that module, do without it: what a plain module calls has an exact rule, or is "
            "refused. Otherwise look for what differs between ranks (random numbers that are not torch's); failing "
            "that a rule is wrong: use domain: 1, and report it."
        )


def verify_parity(
    model: nn.Module,
    example_inputs: tuple,
    manager: DomainParallelManager | None = None,
    *,
    shard_dim: int = -2,
    kwargs: dict | None = None,
    custom_converters: Mapping[Any, Converter] | None = None,
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    cut: Cut | None = None,
) -> ParityReport:
    """Compare `model` converted, on shards, with `model` on whole fields. To be called on every domain rank.

    Compared are outputs, gradients of inputs and of parameters under random cotangents, and buffers afterwards. All
    work is done on copies in `dtype`, `model` and the random generators stay as they are. In the copies, trainable
    parameters that are all zero are drawn at random: a head that starts as the zero map would hide all before it.
    Each rank holds the activations of the whole model once, and its copies.

    Args:
        model: the plain model, the same on every domain rank, in the mode (train or eval) to be checked.
        example_inputs: what to call it with: the same whole fields on every domain rank, of any floating type.
        manager: of the domain group; the global one by default. On one rank the plain model is run twice.
        shard_dim: as in `convert_to_domain_parallel`, like `custom_converters`.
        kwargs: what to call it with by name.
        tolerance: the largest error that counts as exact; see `ParityReport.errors`.
        seed: of what the model draws, and of the cotangents.
        cut: what else is done to the sharded model, before it is converted.

    Raises:
        DomainParallelError: on every rank, if something in the model is refused, or if the model is converted
            already, cannot be copied, gives no tensors, or is not the same on all domain ranks, or its inputs are not.
        PartitionError: if an input has fewer rows than there are domain ranks.
    """
    manager = manager or get_domain_parallel_manager() or DomainParallelManager(1, 1)
    leaves, structure = tree_flatten((example_inputs, kwargs or {}))
    _refuse_unfit(model, leaves, manager)
    leaves = [_cast(x, dtype) if isinstance(x, Tensor) else x for x in leaves]
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        prepared, border = _prepared(model, dtype, seed), Border(manager, shard_dim)
        comparison = _Comparison(prepared, leaves, structure, border, custom_converters, dtype, seed, cut)
        errors, calls = comparison.compare()
        report = ParityReport(manager.domain_world_size, dtype, tolerance, errors, calls)
        if report.exact:
            return report
        first, first_error = comparison.first_departure(tolerance)
    return dataclasses.replace(report, first=first, first_error=first_error)


class Cut(Protocol):
    """Another way in which a model is sharded, such as tensor parallelism."""

    def apply(self, model: nn.Module) -> nn.Module: ...

    def whole(self, model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's gradients, from those by name of a rank."""


class _Run:
    """One of the two models, run forward on `leaves` of (args, kwargs), the sharded one on this rank's rows."""

    def __init__(
        self, model: nn.Module, leaves: list[Any], structure: Any, border: Border, seed: int, cut: Cut | None
    ) -> None:
        self.model, self.border, self.cut = model, border, cut
        self.is_sharded = isinstance(model, DomainParallelRoot)
        self.inputs = {i: self._entering(x.detach()) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        # A model may change in place what it is given, which autograd forbids of leaves.
        given = [self.inputs[i].clone() if i in self.inputs else x for i, x in enumerate(leaves)]
        args, kwargs = tree_unflatten(given, structure)
        torch.manual_seed(seed)
        self.outputs = _tensors(model(*args, **kwargs))

    def _entering(self, x: Tensor) -> Tensor:
        if self.is_sharded and self.border.is_field(x):
            x = shard_tensor(x, self.border.shard_dim, self.border.manager)
        return x.requires_grad_(_has_gradient(x))

    def _leaving(self, x: Tensor) -> Tensor:
        """What this rank is to have of a tensor at the border of the model, which the sharded one has cut."""
        return x if self.is_sharded else self.border.leave(x)

    def _total(self, x: Tensor) -> Tensor:
        """The gradient of what is whole on every rank, which the sharded model leaves in parts."""
        return AllSum.apply(x, self.border.manager) if self.is_sharded else x

    def backward(self, cotangents: list[Tensor]) -> None:
        """From cotangents of the whole outputs."""
        if self.is_sharded:
            cotangents = [self.border.leave(cotangent) for cotangent in cotangents]
        pairs = [pair for pair in zip(self.outputs, cotangents, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [cotangent for _, cotangent in pairs])

    def named_outputs(self) -> dict[Key, Tensor]:
        return {("output", str(i)): self._leaving(y) for i, y in enumerate(self.outputs)}

    def named_gradients(self) -> dict[Key, Tensor]:
        found = {}
        for i, x in self.inputs.items():
            if x.requires_grad:
                gradient = self._leaving(_gradient(x))
                found["input gradient", str(i)] = gradient if self.border.is_field(x) else self._total(gradient)
        gradients = {name: _gradient(parameter) for name, parameter in self.model.named_parameters()}
        if self.cut is not None:
            gradients = self.cut.whole(self.model, gradients)
        for name, gradient in gradients.items():
            found["parameter gradient", name] = self._total(gradient)
        return found

    def named_buffers(self) -> dict[Key, Tensor]:
        return {("buffer", name): whole(buffer) for name, buffer in self.model.named_buffers()}


@dataclass
class _Comparison:
    """What the two models are made from, and run on."""

    model: nn.Module
    leaves: list[Any]
    structure: Any
    border: Border
    custom_converters: Mapping[Any, Converter] | None
    dtype: torch.dtype
    seed: int
    cut: Cut | None

    def run(self, sharded: bool, see: Callable[[Key, Tensor], None] | None = None) -> _Run:
        """A new copy of a model, run forward; `see` is given what its modules give."""
        model = copy.deepcopy(self.model)
        if sharded:
            manager, shard_dim = self.border.manager, self.border.shard_dim
            model = model if self.cut is None else self.cut.apply(model)
            model = convert_to_domain_parallel(model, manager, shard_dim, self.custom_converters)
        if see is not None:
            _watch(model, see)
        return _Run(model, self.leaves, self.structure, self.border, self.seed, self.cut if sharded else None)

    def compare(self) -> tuple[dict[str, float], dict[str, int]]:
        """Errors by kind and name, and the torch functions that met slabs."""
        plain = self.run(sharded=False)
        if not plain.outputs:
            raise DomainParallelError(f"{type(self.model).__name__} gives no tensors: there is nothing to compare")
        calls: Counter[str] = Counter()
        slabs.observer = lambda function: calls.update([torch.overrides.resolve_name(function) or str(function)])
        try:
            sharded = self.run(sharded=True)
            pairs = _pairs(sharded.named_outputs(), plain.named_outputs())
            # No cotangent fits an output of another shape, and a NaN leaves nothing to compare.
            if all(map(math.isfinite, self.errors(pairs).values())):
                generator = torch.Generator().manual_seed(self.seed)
                cotangents = [_random(y, generator) for y in plain.outputs]
                plain.backward(cotangents)
                sharded.backward(cotangents)
                pairs |= _pairs(sharded.named_gradients(), plain.named_gradients())
        finally:
            slabs.observer = None
        pairs |= _pairs(sharded.named_buffers(), plain.named_buffers())
        return {" ".join(key): error for key, error in self.errors(pairs).items()}, dict(calls)

    def first_departure(self, tolerance: float) -> tuple[str, float] | tuple[None, None]:
        """The first module, in order of execution, whose output is off by more than `tolerance`, and by how much."""
        expected: dict[Key, Tensor] = {}
        pairs: Pairs = {}

        def compare(key: Key, ours: Tensor) -> None:
            if key in expected:
                pairs[key] = _module_pair(key[0], ours, expected[key], self.border)

        self.run(sharded=False, see=lambda key, output: expected.update({key: output.detach().clone()}))
        self.run(sharded=True, see=compare)
        found = ((path or type(self.model).__name__, error) for (path, _), error in self.errors(pairs).items())
        return next(((path, error) for path, error in found if error > tolerance), (None, None))

    def errors(self, pairs: Pairs) -> dict[Key, float]:
        """What `ParityReport.errors` says, over the rows of all ranks."""
        manager = self.border.manager
        table = torch.tensor([*pairs.values()], dtype=torch.float64)
        if manager.domain_world_size > 1:
            table = table.to(manager.message_device)
            dist.all_reduce(table, dist.ReduceOp.MAX, group=manager.domain_group)
        totals = dict(zip(pairs, table.tolist(), strict=True))
        noise = torch.finfo(self.dtype).eps ** 0.25
        largest: dict[str, float] = {}
        for (kind, _), (_, size) in totals.items():
            largest[kind] = max(size, largest.get(kind, 0.0))
        return {key: _relative(off, max(size, noise * largest[key[0]])) for key, (off, size) in totals.items()}


def _module_pair(path: str, ours: Tensor, theirs: Tensor, border: Border) -> tuple[float, float]:
    """Of what the module at `path` gave."""
    if not path:
        return _pair(ours, border.leave(theirs))
    if type(ours) is Slab:
        return _pair(ours.local, own(theirs, ours.cut, ours)) if ours.shape == theirs.shape else (math.inf, 0.0)
    if isinstance(ours, Slab):  # of another kind, within a block: what the block gives is compared
        return 0.0, 0.0
    # Rows that a custom converter's module gives to its children have no counterpart.
    return _pair(ours, theirs) if ours.shape == theirs.shape else (0.0, 0.0)


def _refuse_unfit(model: nn.Module, leaves: list[Any], manager: DomainParallelManager) -> None:
    if any(isinstance(module, DomainParallelLayer | DomainParallelRoot) for module in model.modules()):
        raise DomainParallelError("verify_parity takes the plain model, and converts a copy: this one is converted")
    if manager.domain_world_size == 1:
        return
    modes = torch.tensor([module.training for module in model.modules()])
    numbers = [_digest([modes, *model.parameters(), *model.buffers()]), _digest(leaves)]
    columns = zip(*gather_numbers(numbers, manager), strict=True)
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
    except RuntimeError as error:
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


def _pairs(ours: dict[Key, Tensor], theirs: dict[Key, Tensor]) -> Pairs:
    return {key: _pair(ours.get(key), theirs.get(key)) for key in theirs | ours}


def _pair(ours: Tensor | None, theirs: Tensor | None) -> tuple[float, float]:
    if ours is None or theirs is None:
        return math.inf, 0.0
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    reference = theirs.detach().to(wide)
    alike = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    off = _largest(ours.detach().to(wide) - reference, math.inf) if alike else math.inf
    return off, _largest(reference, 0.0)


def _largest(x: Tensor, if_not_finite: float) -> float:
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest if math.isfinite(largest) else if_not_finite


def _relative(off: float, size: float) -> float:
    if off == 0:
        return 0.0
    return off / size if size else math.inf
