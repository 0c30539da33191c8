"""Random programs of a few operators: views, changes in place, several outputs, on odd shapes and on cubes.

python -m tests.domain_parallel.programs --programs 20000 --first 0
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from credit.domain_parallel import DomainParallelError, verify_parity
from credit.domain_parallel.outcome import shares
from credit.domain_parallel.partition import PartitionError
from credit.domain_parallel.storage import windows_overlap
from credit.domain_parallel.thread_ranks import ThreadWorld, thread_ranks
from credit.parallel.channels import Channels
from tests.domain_parallel import database

SHAPES = [(2, 4, 6, 6), (6, 6, 6, 6), (1, 3, 7, 5), (2, 3, 5, 4), (1, 4, 12, 6), (2, 2, 9, 8), (3, 1, 4, 7)]
MAX_ENTRIES = 20_000


@dataclass(frozen=True)
class Step:
    """operator(x, y, numbers), of two values there are."""

    name: str
    x: int
    y: int
    numbers: tuple[float, ...]


Operator = Callable[[Tensor, Tensor, Any], Any]


class Numbers:
    """Arguments drawn from a step's numbers, one after another."""

    def __init__(self, numbers: tuple[float, ...]) -> None:
        self.rest: Iterator[float] = iter(numbers)

    def up_to(self, stop: int) -> int:
        """0 to stop - 1."""
        return int(next(self.rest) * stop)

    def axis(self, x: Tensor) -> int:
        """Counted from the front or from the end."""
        axis = self.up_to(x.ndim)
        return axis - x.ndim if next(self.rest) < 0.5 else axis

    def order(self, x: Tensor) -> list[int]:
        return sorted(range(x.ndim), key=lambda axis: next(self.rest))

    def slice(self, x: Tensor, axis: int) -> slice:
        length = x.shape[axis]
        start = self.up_to(length)
        return slice(start, start + 1 + self.up_to(length - start), 1 + self.up_to(2))

    def index(self, x: Tensor) -> tuple[Any, ...]:
        """Slices, whole numbers and new axes."""
        items: list[Any] = []
        for axis in range(x.ndim):
            kind = self.up_to(5)
            items.append(slice(None) if kind < 2 else self.slice(x, axis) if kind < 4 else self.up_to(x.shape[axis]))
        return tuple(items)


def _rows(x: Tensor, n: Numbers, count: int) -> Tensor:
    """Some entries of an axis, in any order, perhaps twice."""
    return torch.tensor([n.up_to(x.shape[0]) for _ in range(count)])


def _viewed(x: Tensor, n: Numbers) -> Tensor:
    """A view of a view."""
    return x.transpose(n.axis(x), n.axis(x))[n.index(x)]


def _set(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


def _split_axis(x: Tensor, n: Numbers) -> Tensor:
    axis = n.axis(x)
    factor = next((f for f in (2, 3, 5) if x.shape[axis] % f == 0), 1)
    return x.unflatten(axis, (factor, -1) if n.up_to(2) else (-1, factor))


def _conv(x: Tensor, n: Numbers) -> Tensor:
    channels = x.shape[1]
    kernel = 1 + n.up_to(3)
    weight = torch.linspace(-0.3, 0.4, 4 * channels * kernel * kernel, dtype=x.dtype).view(4, channels, kernel, kernel)
    return F.conv2d(x, weight, stride=1 + n.up_to(2), padding=n.up_to(kernel))


PURE: dict[str, Operator] = {
    "tanh": lambda x, y, n: torch.tanh(x),
    "cos": lambda x, y, n: x.cos(),
    "add": lambda x, y, n: x + y,
    "mul": lambda x, y, n: x * y.tanh(),
    "where": lambda x, y, n: torch.where(x > 0.1, x, 0.5 * y),
    "maximum": lambda x, y, n: torch.maximum(x, y),
    "lerp": lambda x, y, n: torch.lerp(x, y, 0.3),
    "clamp": lambda x, y, n: x.clamp(-0.5, max=0.9),
    "masked_fill": lambda x, y, n: x.masked_fill(y > 0.5, -0.2),
    "sum": lambda x, y, n: x.sum(n.axis(x), keepdim=n.up_to(2) > 0) * 0.3,
    "mean": lambda x, y, n: x.mean(axis=n.axis(x), keepdims=True),
    "std": lambda x, y, n: x.std(axis=n.axis(x), keepdim=True),
    "var": lambda x, y, n: x.var((n.axis(x), -1), correction=0),
    "amax": lambda x, y, n: x.amax(n.axis(x), n.up_to(2) > 0),
    "max": lambda x, y, n: list(torch.max(x, n.axis(x))),
    "norm": lambda x, y, n: torch.linalg.vector_norm(x, dim=n.axis(x)),
    "cumsum": lambda x, y, n: x.cumsum(n.axis(x)) * 0.3,
    "cummax": lambda x, y, n: torch.cummax(x, n.axis(x)).values,
    "diff": lambda x, y, n: torch.diff(x, 1 + n.up_to(2), n.axis(x)),
    "softmax": lambda x, y, n: x.softmax(n.axis(x)),
    "sort": lambda x, y, n: list(x.sort(n.axis(x), descending=n.up_to(2) > 0)),
    "flip": lambda x, y, n: torch.flip(x, (n.axis(x),)),
    "roll": lambda x, y, n: x.roll(1 + n.up_to(3), n.axis(x)),
    "roll flat": lambda x, y, n: x.roll(1 + n.up_to(3)),
    "cat": lambda x, y, n: torch.cat([x, y], n.axis(x)),
    "stack": lambda x, y, n: torch.stack([x, y], axis=n.axis(x)),
    "repeat": lambda x, y, n: x.repeat(*[1 + (n.up_to(4) == 0) for _ in range(x.ndim)]),
    "repeat_interleave": lambda x, y, n: x.repeat_interleave(2, n.axis(x)),
    "pad": lambda x, y, n: F.pad(x, (n.up_to(2), n.up_to(3) - 1, n.up_to(3), n.up_to(2)), value=0.2),
    "pad circular": lambda x, y, n: F.pad(x, (1, n.up_to(2), n.up_to(3), 1), mode="circular"),
    "conv": lambda x, y, n: _conv(x, n),
    "group_norm": lambda x, y, n: F.group_norm(x, 1),
    "layer_norm": lambda x, y, n: F.layer_norm(x, x.shape[-1 - n.up_to(x.ndim) :]),
    "avg_pool": lambda x, y, n: F.avg_pool2d(x, 2, 1 + n.up_to(2), ceil_mode=n.up_to(2) > 0),
    "max_pool": lambda x, y, n: F.max_pool2d(x, 2, 1, 1),
    "interpolate": lambda x, y, n: F.interpolate(x, size=(3 + n.up_to(7), 3 + n.up_to(5)), mode="bilinear"),
    "matmul": lambda x, y, n: x @ y.transpose(-1, -2) * 0.1,
    "einsum": lambda x, y, n: torch.einsum("...ij,...kj->...ik", x, y) * 0.1,
    "linear": lambda x, y, n: F.linear(x, torch.linspace(-1, 1, 3 * x.shape[-1], dtype=x.dtype).view(3, -1)),
    "fft": lambda x, y, n: torch.fft.fft(x.double(), dim=n.axis(x)).real * 0.2,
    "rfft": lambda x, y, n: torch.fft.rfft(x.double(), None, n.axis(x)).abs() * 0.2,
    "index_select": lambda x, y, n: x.index_select(0, _rows(x, n, 3)),
    "gather": lambda x, y, n: x.gather(n.axis(x), torch.zeros([1] * x.ndim, dtype=torch.long).expand(x.shape)),
    "list index": lambda x, y, n: x.movedim(n.axis(x), 0)[[0, -1, n.up_to(x.shape[0])]],
    "mask": lambda x, y, n: x[x > 0.3],
    "index_add": lambda x, y, n: x.index_add(0, torch.tensor([0]), y[:1]),
    "scatter": lambda x, y, n: x.scatter(n.axis(x), torch.zeros([1] * x.ndim, dtype=torch.long), 0.3),
    "tril": lambda x, y, n: x.tril(),
    "cross": lambda x, y, n: torch.trapezoid(x, dim=n.axis(x)),
    "item": lambda x, y, n: x * x.sum().detach().tanh().item(),
    "out": lambda x, y, n: torch.add(x.detach(), y.detach(), out=x.new_empty(0)),
    "dropout": lambda x, y, n: F.dropout(x, 0.3),
    "randn": lambda x, y, n: x + torch.randn_like(x),
    "clone": lambda x, y, n: x.clone(),
    "channels_last": lambda x, y, n: x.contiguous(memory_format=torch.channels_last),
    "sdpa": lambda x, y, n: F.scaled_dot_product_attention(x, x, x, is_causal=n.up_to(2) > 0),
}
VIEWS: dict[str, Operator] = {
    "slice": lambda x, y, n: x[n.index(x)],
    "select": lambda x, y, n: x.select(n.axis(x), 0),
    "narrow": lambda x, y, n: x.narrow(n.axis(x), 0, 2),
    "transpose": lambda x, y, n: x.transpose(n.axis(x), n.axis(x)),
    "permute": lambda x, y, n: x.permute(*n.order(x)),
    "flatten": lambda x, y, n: x.flatten(n.up_to(x.ndim)),
    "reshape": lambda x, y, n: x.reshape(-1, x.shape[-1]),
    "view": lambda x, y, n: x.view(x.shape[0], -1),
    "unflatten": lambda x, y, n: _split_axis(x, n),
    "unsqueeze": lambda x, y, n: x.unsqueeze(n.axis(x)),
    "squeeze": lambda x, y, n: x.squeeze(),
    "unbind": lambda x, y, n: list(x.unbind(n.axis(x)))[:2],
    "chunk": lambda x, y, n: list(x.chunk(2, n.axis(x))),
    "split": lambda x, y, n: list(x.split([1, x.shape[-2] - 1], -2)),
    "unfold": lambda x, y, n: x.unfold(n.axis(x), 2, 1 + n.up_to(2)),
    "diagonal": lambda x, y, n: x.diagonal(0, n.axis(x), n.axis(x)),
    "expand": lambda x, y, n: x.unsqueeze(0).expand(2, *x.shape),
    "movedim": lambda x, y, n: x.movedim(n.axis(x), n.axis(x)),
    "viewed": lambda x, y, n: _viewed(x, n),
    "contiguous": lambda x, y, n: x.contiguous(),
    "detach": lambda x, y, n: x.detach(),
}
IN_PLACE: dict[str, Operator] = {
    "add_": lambda x, y, n: x.add_(y, alpha=0.5),
    "mul_": lambda x, y, n: x.mul_(0.7),
    "sin_": lambda x, y, n: x.sin_(),
    "clamp_": lambda x, y, n: x.clamp_(-0.4, 0.8),
    "relu": lambda x, y, n: F.relu(x, inplace=True),
    "iadd": lambda x, y, n: x.__iadd__(0.3),
    "slice mul_": lambda x, y, n: (x[n.index(x)].mul_(2), x)[1],
    "slice add": lambda x, y, n: (x[n.index(x)].add_(0.1), x)[1],
    "view of slice": lambda x, y, n: (_viewed(x, n).mul_(-1), x)[1],
    "set": lambda x, y, n: _set(x, n.index(x), 0.25),
    "set value": lambda x, y, n: _set(x, (index := n.index(x)), x[index] * 0.5 + 1),
    "set rows": lambda x, y, n: _set(x, (Ellipsis, slice(1, 3), slice(None)), x[..., :2, :] * 3),
    "set mask": lambda x, y, n: _set(x, x > 0.6, 0.0),
    "set list": lambda x, y, n: _set(x, [0, -1], 0.5),
    "fill diagonal": lambda x, y, n: (x.diagonal(0, -2, -1).fill_(0.5), x)[1],
    "reshaped": lambda x, y, n: (x.reshape(-1)[:: 1 + n.up_to(2)].mul_(0.5), x)[1],
    "copy_": lambda x, y, n: x.copy_(y),
    "masked_fill_": lambda x, y, n: x.masked_fill_(x < -0.5, 0.1),
    "index_fill_": lambda x, y, n: x.index_fill_(n.axis(x), torch.tensor([0]), 0.4),
    "index_add_": lambda x, y, n: x.index_add_(0, torch.tensor([0]), y[:1]),
    "index_copy_": lambda x, y, n: x.index_copy_(0, torch.tensor([0]), y[:1].clone()),
    "unbind mul_": lambda x, y, n: ([row.mul_(0.5) for row in x.detach().unbind(n.axis(x))], x)[1],
    "dropout_": lambda x, y, n: F.dropout(x, 0.2, inplace=True),
    "normal_": lambda x, y, n: x.detach().normal_(),
}
OPERATORS = PURE | VIEWS | IN_PLACE


class Program(nn.Module):
    """Steps on a list of values, the first two made of a field, the third a parameter that is whole."""

    def __init__(self, steps: list[Step], channels: int) -> None:
        super().__init__()
        self.steps = steps
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(channels, 1, 1))

    def start(self, x: Tensor) -> list[Tensor]:
        x = torch.tanh(x * self.scale)
        return [x, x * 0.5 + 0.1, self.scale * 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        values = self.start(x)
        for step in self.steps:
            take(step, values)
        return values


def take(step: Step, values: list[Tensor]) -> None:
    """Do it, and keep what it gives."""
    found = OPERATORS[step.name](values[step.x], values[step.y], Numbers(step.numbers))
    for one in found if isinstance(found, list) else [found]:
        if not any(one is value for value in values):
            values.append(one)


def program(seed: int) -> tuple[Program, Tensor]:
    """Steps that one device can run, the next chosen when the one before has been."""
    draw = random.Random(seed)
    shape = draw.choice(SHAPES)
    torch.default_generator.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64)
    made = Program([], shape[1]).double()
    length = draw.randint(3, 8)
    while len(made.steps) < length:
        kind = draw.choice([PURE, VIEWS, IN_PLACE])
        name = draw.choice([*kind])
        torch.default_generator.manual_seed(seed)  # or what it draws could be empty the next time
        values = _run(made, x)
        step = Step(name, draw.randrange(len(values)), draw.randrange(len(values)), _drawn(draw))
        if draw.random() < 0.6:  # further steps rather follow on what was made last
            step = Step(name, len(values) - 1, step.y, step.numbers)
        if _can(step, values):
            made.steps.append(step)
    return made, x


def _drawn(draw: random.Random) -> tuple[float, ...]:
    return tuple(draw.random() for _ in range(40))


def _run(made: Program, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return made(x)


def _can(step: Step, values: list[Tensor]) -> bool:
    x, y = values[step.x], values[step.y]
    if step.name in IN_PLACE and (windows_overlap(x.shape, x.stride()) or (x is not y and shares(x, y))):
        return False  # torch leaves open what comes of it
    try:
        with torch.no_grad():
            take(step, values)
    except Exception:  # not for such shapes
        return False
    sizes = [value.numel() for value in values]
    return max(sizes) < MAX_ENTRIES and all(bool(value.isfinite().all()) for value in values)


def _has_gradients(made: Program, x: Tensor, seed: int) -> bool:
    """False if a value was changed that the backward needs: torch refuses that."""
    x = x.clone().requires_grad_()
    torch.default_generator.manual_seed(seed)
    try:
        outputs = [y for y in made(x * 1) if y.requires_grad]
        torch.autograd.grad(outputs, [x, made.scale], [torch.ones_like(y) for y in outputs], allow_unused=True)
    except RuntimeError:
        return False
    return True


class Quiet(nn.Module):
    """A program without gradients."""

    def __init__(self, inner: Program) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.inner(x)


def verdict(seed: int, ranks: int) -> str:
    """ "exact", "refused" and why, or what is wrong."""
    made, x = program(seed)
    model: nn.Module = made if _has_gradients(made, x, seed) else Quiet(made)
    try:
        report = verify_parity(model, (x,), ranks=ranks, seed=seed)
    except (DomainParallelError, PartitionError) as error:
        return f"refused {error}"
    except Exception as error:
        return f"CRASH {error!s:.1500}"
    return "exact" if report.exact else f"WRONG {report}"


def verdict_on_channels(seed: int, world: ThreadWorld) -> str:
    """The same of a program between a column layer and a row layer, whose second axis is cut."""
    made, x = program(seed)
    gradients = _has_gradients(made, x, seed)

    def call(x: Tensor, scale: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            return functional_call(copy.deepcopy(made), {"scale": scale}, (x * 1,))

    leaves = [x.requires_grad_(gradients), made.scale.detach().requires_grad_(gradients)]
    given = database.Call(f"program {seed}", call, leaves, tree_flatten((tuple(leaves), {}))[1])
    return database.verdict(world, given, 0, 1, database.run_plain(given), 1e-9, Channels)


def described(seed: int) -> str:
    made, x = program(seed)
    steps = "\n".join(
        f"  {s.name} of {s.x}, {s.y} ({', '.join(f'{n:.2f}' for n in s.numbers[:6])}...)" for s in made.steps
    )
    return f"program {seed} on {tuple(x.shape)}:\n{steps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--channels", action="store_true", help="cut as channels are, over 2 ranks, not as rows")
    options = parser.parse_args()
    logging.getLogger("credit").setLevel(logging.ERROR)
    counts: Counter = Counter()
    with thread_ranks(2) as world:
        for seed in range(options.first, options.first + options.programs):
            found = verdict_on_channels(seed, world) if options.channels else verdict(seed, 2 + seed % 3)
            counts[found.partition(" ")[0]] += 1
            if found != "exact" and not (options.channels and found.startswith("refused")):
                print(described(seed), found, sep="\n", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
