"""What was found when a sharded model was compared with the plain one, and how far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        gathered: what was computed on whole fields, for want of a rule: exact, but it costs; with module and line.
    """

    ranks: int
    dtype: torch.dtype
    tolerance: float
    errors: dict[str, float]
    calls: dict[str, int]
    first: str | None = None
    first_error: float | None = None
    gathered: tuple[str, ...] = ()

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
        lines += [f"gathered: {one}" for one in self.gathered]
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
            "If a custom converter made that module, do without it: what a plain module calls is done exactly, or "
            "refused. Otherwise look for what differs between ranks (random numbers that are not torch's); failing "
            "that a rule is wrong: use domain: 1, and report it."
        )


def pairs_of(kind: str, ours: Iterable[tuple[Any, Tensor]], theirs: Iterable[tuple[Any, Tensor]]) -> Pairs:
    """Of tensors of one kind, by name."""
    a, b = dict(ours), dict(theirs)
    return {(kind, str(name)): pair_of(a.get(name), b.get(name)) for name in b | a}


def pair_of(ours: Tensor | None, theirs: Tensor | None) -> tuple[float, float]:
    """max |ours - theirs|, infinite if they cannot be compared, and max |theirs|."""
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


def relative(off: float, size: float) -> float:
    """off / size; infinite where nothing but zero was expected."""
    if off == 0:
        return 0.0
    return off / size if size else math.inf
