"""Random numbers of a forward that are functions of the sample, so that dropout does not depend on the mesh.

One device draws for its whole batch, a replica for its part, and `accumulate` for a part of that. Here what has entries
for each sample is drawn sample by sample, from a seed made of the step, the sample and the number of the draw; what is
drawn once for a batch is the same everywhere. Torch itself says which of its operators draw
(`torch.Tag.nondeterministic_seeded`), and two looks at the model, with one sample and with two, say which axis the
samples are on: the first, or it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit.domain_parallel.generators import seed_torch, torch_generator_state
from credit.domain_parallel.torch_private import TorchDispatchMode
from credit.errors import CreditError


class Shape(NamedTuple):
    """What tells draws apart: the operator, all axes but the first, and its numbers (probabilities)."""

    operator: str
    rest: tuple[int, ...]
    numbers: tuple[float, ...]


class Seen(NamedTuple):
    """One draw of a forward, with the length of its first axis."""

    shape: Shape
    length: int


class Plan:
    """Which draws are by sample.

    Attributes:
        rows: of each shape, entries of the first axis that a sample has; more numbers than one where they differ.
        fixed: of each shape, lengths of the first axis of what is drawn once for a batch.
    """

    def __init__(self, one: Sequence[Seen], two: Sequence[Seen]) -> None:
        """From what a forward draws for one sample, and for two.

        Raises:
            CreditError: if it is not the same draws, or samples are not along the first axis.
        """
        self.rows: dict[Shape, set[int]] = {}
        self.fixed: dict[Shape, set[int]] = {}
        if [seen.shape for seen in one] != [seen.shape for seen in two]:
            operators = ", ".join(sorted({seen.shape.operator for seen in (*one, *two)}))
            raise CreditError(f"what it draws ({operators}) does not have the samples as its first axis")
        for a, b in zip(one, two, strict=True):
            if b.length == 2 * a.length:
                self.rows.setdefault(a.shape, set()).add(a.length)
            elif b.length == a.length:
                self.fixed.setdefault(a.shape, set()).add(a.length)
            else:
                raise CreditError(f"{a.shape.operator} draws {a.length} rows for a sample and {b.length} for two")

    def __bool__(self) -> bool:
        return bool(self.rows or self.fixed)

    def of(self, shape: Shape, length: int, samples: int) -> int | None:
        """Entries a sample of such a draw; None if it is one for the whole batch.

        Raises:
            CreditError: if no such draw was seen, or both kinds.
        """
        fits = {rows for rows in self.rows.get(shape, ()) if rows * samples == length}
        if len(fits) + (length in self.fixed.get(shape, ())) != 1:
            raise CreditError(
                f"the model draws with {shape.operator}, {(length, *shape.rest)} for {samples} samples, otherwise than "
                f"when it was first looked at: what is drawn must not depend on the data"
            )
        return fits.pop() if fits else None


class _Draws(TorchDispatchMode):
    """Hands every operator on but those that draw."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self.draw(func, args, kwargs)

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def of_slice(self, rank: int) -> _Draws:
        """For a slice of a device (`credit.domain_parallel.slices`): each draws what the whole does."""
        raise NotImplementedError


class Recorded(_Draws):
    """While it lasts, draws are done as torch does them, and listed.

    Attributes:
        seen: those that moved the generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def of_slice(self, rank: int) -> Recorded:
        return self if rank == 0 else Recorded()

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _seen(func, args)
        found, drawn = _called(func, args, kwargs)
        if drawn:
            self.seen.append(given)
        return found


class SampleDraws(_Draws):
    """While it lasts, draws are functions of the generator's state at its beginning and of the samples.

    It is to last over the backward too, in which checkpoints run parts of the forward again.

    Args:
        samples: of each sample of the batch, the numbers that tell it from others.
    """

    def __init__(self, plan: Plan, samples: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.plan, self.samples = plan, samples

    def of_slice(self, rank: int) -> SampleDraws:
        return SampleDraws(self.plan, self.samples)

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = _seen(func, args)
        if seen.shape not in self.plan.rows and seen.shape not in self.plan.fixed:
            found, drawn = _called(func, args, kwargs)
            if not drawn:
                return found  # attention without dropout, say
        rows = self.plan.of(seen.shape, seen.length, len(self.samples))
        key = int(torch.randint(2**62, ()))
        after = torch.default_generator.get_state()
        try:
            if rows is None:
                seed_torch(key)
                return func(*args, **kwargs)
            return self._by_sample(func, args, kwargs, rows, seen.length, key)
        finally:
            torch.default_generator.set_state(after)

    def _by_sample(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, length: int, key: int
    ) -> Any:
        parts = []
        for number, sample in enumerate(self.samples):
            seed_torch(hash((key, *sample)) % 2**63)
            of_sample = [_part(x, number * rows, rows, length) for x in args]
            named = {name: _part(x, number * rows, rows, length) for name, x in kwargs.items()}
            parts.append(func(*of_sample, **named))
            if func._schema.is_mutable:
                args[0].narrow(0, number * rows, rows).copy_(of_sample[0])
        if func._schema.is_mutable:
            return args[0]
        if isinstance(parts[0], Tensor):
            return _joined(parts, args)
        if not all(isinstance(x, Tensor) and x.ndim and x.shape[0] == rows for part in parts for x in part):
            raise CreditError(f"{func} draws inside, where it cannot be done sample by sample")
        return tuple(_joined(each, args) for each in zip(*parts, strict=True))


def _joined(parts: Sequence[Tensor], args: tuple[Any, ...]) -> Tensor:
    """The samples' results as one, stored as torch would store it: like the operand, if it is of its shape."""
    whole = torch.cat([*parts])
    like = next((x for x in args if isinstance(x, Tensor)), whole)
    if like.shape != whole.shape or like.stride() == whole.stride():
        return whole
    return torch.empty_like(like, dtype=whole.dtype).copy_(whole)


def _part(x: Any, first: int, rows: int, length: int) -> Any:
    """Of one sample; contiguous, as numbers are drawn in the order of memory, which may depend on the batch."""
    if isinstance(x, Tensor):
        return x.narrow(0, first, rows).contiguous() if x.ndim and x.shape[0] == length else x
    if isinstance(x, list) and x and x[0] == length and all(isinstance(n, int) for n in x):
        return [rows, *x[1:]]
    return x


def _seen(func: Any, args: tuple[Any, ...]) -> Seen:
    """What is drawn has the shape of the first tensor, or is given as a list of lengths."""
    shape = next((tuple(x.shape) for x in args if isinstance(x, Tensor)), None)
    if shape is None:
        shape = next((tuple(x) for x in args if isinstance(x, list | tuple)), ())
    numbers = tuple(x for x in args if isinstance(x, float))
    return Seen(Shape(str(func), shape[1:], numbers), shape[0] if shape else 1)


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """func(*args, **kwargs), and whether it drew."""
    before = torch_generator_state()
    found = func(*args, **kwargs)
    return found, torch_generator_state() != before
