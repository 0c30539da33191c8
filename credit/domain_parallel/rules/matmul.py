"""Products: linear layers, matrix products, einsum.

Each axis of each operand has a letter. One letter stays cut; operands that have it are cut along it, the others are
made whole. If the result has the letter the product is local, otherwise the ranks' products are summed.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit.domain_parallel.reshard import AllSum, cut_along, reshard, whole
from credit.domain_parallel.rules.axes import axis_of, back
from credit.domain_parallel.rules.elementwise import align, lead, pointwise
from credit.domain_parallel.slab import Declined, Slab, bound, is_slab, register_rule, rule


def contract(func: Any, operands: list[Tensor], letters: list[str], out: str) -> Any:
    """func(*operands), whose axes are named by `letters` and those of the result by `out`."""
    if any(len(names) != x.ndim for x, names in zip(operands, letters, strict=True)):
        raise Declined
    cuts = [(x, names[x.cut]) for x, names in zip(operands, letters, strict=True) if is_slab(x)]
    # A letter that survives is better than one that is summed over: the ranks' results need no sum.
    like, letter = min(cuts, key=lambda cut: (cut[1] not in out, -cut[0].numel()))
    locals_ = [_cut_along(x, names, letter, like) for x, names in zip(operands, letters, strict=True)]
    product = func(*locals_)
    if letter in out:
        return like.like(product, out.index(letter))
    return AllSum.apply(product, like.group)


def _cut_along(x: Tensor, names: str, letter: str, like: Slab) -> Tensor:
    axis = names.find(letter)
    if axis < 0 or x.shape[axis] == 1:
        return whole(x)
    if x.shape[axis] != like.shape[like.cut]:
        raise Declined
    return cut_along(x, axis, like)


@rule("outer", "ger")
def outer(input: Tensor, vec2: Tensor) -> Any:
    if is_slab(input):
        return input.like(torch.outer(input.local, whole(vec2)), 0)
    if not is_slab(vec2):
        raise Declined
    return vec2.like(torch.outer(input, vec2.local), 1)


def sparse_product(input: Tensor, dense: Tensor) -> Any:
    """A whole sparse matrix times a field whose rows are cut: with its columns cut instead."""
    if input.layout is torch.strided or not is_slab(dense) or dense.ndim != 2:
        raise Declined
    there = reshard(dense, 1)
    return back(torch.sparse.mm(input, there.local), there, dense.cut)


register_rule(torch.sparse.mm, bound(torch.sparse.mm, sparse_product, {"sparse": "input"}))


@rule("einsum")
def einsum(args: tuple) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = [*operands[0]]
    if not isinstance(equation, str) or not all(isinstance(x, Tensor) for x in operands):
        raise Declined
    left, arrow, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    if len(letters) != len(operands) or any(
        x.ndim < len(n.replace("...", "")) for x, n in zip(operands, letters, strict=True)
    ):
        raise Declined
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    widest = max([x.ndim - len(names) + 3 for x, names in zip(operands, letters, strict=True) if "..." in names] or [0])
    dots = "".join(spare[:widest])
    letters = [
        names.replace("...", dots[len(dots) - (x.ndim - len(names) + 3) :]) if "..." in names else names
        for x, names in zip(operands, letters, strict=True)
    ]
    if not arrow:
        joined = "".join(letters)
        out = dots + "".join(sorted({c for c in joined if joined.count(c) == 1 and c not in dots}))
    out = out.replace("...", dots)
    if any(len(set(names)) < len(names) for names in letters):
        raise Declined  # a diagonal
    return contract(lambda *xs: torch.einsum(f"{','.join(letters)}->{out}", *xs), operands, letters, out)


@rule("tensordot")
def tensordot(a: Tensor, b: Tensor, dims: Any = 2) -> Any:
    if isinstance(dims, int):
        dims = (range(a.ndim - dims, a.ndim), range(dims))
    if isinstance(dims, Tensor) or not all(isinstance(one, list | tuple | range) for one in dims):
        raise Declined
    of_a, of_b = list(string.ascii_lowercase[: a.ndim]), list(string.ascii_uppercase[: b.ndim])
    pairs = [(axis_of(a, i), axis_of(b, j)) for i, j in zip(*dims, strict=True)]
    for i, j in pairs:
        of_b[j] = of_a[i]
    kept_a = [c for i, c in enumerate(of_a) if i not in [i for i, _ in pairs]]
    kept_b = [c for j, c in enumerate(of_b) if j not in [j for _, j in pairs]]
    left, right, out_letters = "".join(of_a), "".join(of_b), "".join(kept_a + kept_b)
    return einsum((f"{left},{right}->{out_letters}", a, b))


@rule("F.linear")
def linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if is_slab(weight) or is_slab(bias) or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        raise Declined
    if input.cut < input.ndim - 1:
        return input.like(F.linear(input.local, weight, bias))
    names = string.ascii_letters[: input.ndim]
    product = contract(torch.matmul, [input, weight.t()], [names, f"{names[-1]}Z"], f"{names[:-1]}Z")
    if bias is None:
        return product
    return product.like(product.local + bias) if is_slab(product) else product + bias


@rule("bilinear")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    like = lead((input1, input2))
    if like.cut == like.ndim - 1 or is_slab(weight) or is_slab(bias) or input1.shape[:-1] != input2.shape[:-1]:
        raise Declined
    return like.like(F.bilinear(align(input1, like), align(input2, like), weight, bias))


def _matrix_letters(a: Tensor, b: Tensor) -> tuple[list[str], str]:
    batch = string.ascii_lowercase[: max(a.ndim, b.ndim, 2) - 2]
    of_a = batch[len(batch) - max(a.ndim - 2, 0) :] + ("MK" if a.ndim > 1 else "K")
    of_b = batch[len(batch) - max(b.ndim - 2, 0) :] + ("KN" if b.ndim > 1 else "K")
    return [of_a, of_b], batch + ("M" if a.ndim > 1 else "") + ("N" if b.ndim > 1 else "")


@rule("matmul", "bmm", "mm", "mv", "dot", "__matmul__", mat2="other", vec="other", tensor="other")
def matmul(input: Tensor, other: Tensor) -> Any:
    if not is_slab(input) and input.layout is not torch.strided:
        return sparse_product(input, other)
    return contract(torch.matmul, [input, other], *_matrix_letters(input, other))


@rule("Tensor.__rmatmul__")
def rmatmul(input: Tensor, other: Tensor) -> Any:
    return matmul(other, input)


@rule("addmm", "baddbmm", mat1="a", mat2="b", batch1="a", batch2="b")
def addmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta == 0 or not input.is_floating_point():
        raise Declined  # torch then ignores what the first tensor holds; integers do not multiply by fractions
    product = contract(torch.matmul, [a, b], *_matrix_letters(a, b)) if is_slab(a) or is_slab(b) else a @ b
    multiply, add = pointwise(torch.mul), pointwise(torch.add)
    if not is_slab(product):
        return beta * whole(input) + alpha * product
    return add(multiply(product, alpha), multiply(input, beta) if is_slab(input) else input * beta)
