"""torch's own list of what a tensor of one's own may answer as a judge: each function, with arguments that it takes.

The database of operators calls them by their names; this one has what Python's operators, attributes and the functions
written in Python call, too.

python -m tests.domain_parallel.overrides --ranks 2 pow
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import get_testing_overrides, resolve_name
from torch.utils._pytree import tree_flatten

from credit.domain_parallel.thread_ranks import ThreadWorld, thread_ranks
from tests.domain_parallel import database

SHAPE = (2, 4, 6, 6)
TOLERANCE = 1e-9
LEFT_OUT = ["empty", "resize", "random", "__reduce_ex__", "__repr__", "set_", "_cdata", "_is_view", "distributed"]
"""Parts of names of what gives memory as it is, tells where things are, or is for processes."""


def fields() -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(SHAPE, dtype=torch.float64)
    return [x.requires_grad_(), (x.detach() * 0.7 + 0.3).requires_grad_()]


def guesses() -> Iterator[tuple[tuple, dict]]:
    """Arguments that many functions take; the first is the field that is cut."""
    x, y = fields()
    index = torch.tensor([0, 1])
    more: list[tuple] = [(), (y,), (2,), (0.5,), (1,), (-2,), (1, 2), (0, index), (0, index, y.detach()), (1, 0, 2)]
    more += [(y, y), (y, 0.001), ((3, 3),), (2, 2), ((-2, -1),), ([1, 2, 3, 0],), (y > 0,), (y > 0, 0.5), (index,)]
    more += [(torch.float32,), ("mean",), (6, 6), ((2, 24, 6),), (2, 0), (0.2, True), (None, None, None, None, True)]
    more += [((1, 1),), (1, -1, 1), (torch.tensor(2.0, dtype=torch.float64),), (1, index, 0.5)]
    for rest in more:
        yield (x, *rest), {}
    yield ([x, y],), {}
    yield ((x, y), 1), {}
    yield ("bchw->bhc", x), {}
    yield (x.detach()[0, 0],), {}
    yield (x.detach()[0, 0], y.detach()[0, 0]), {}
    yield (x.detach()[0, 0, 0],), {}
    yield (x.detach()[0],), {}
    yield (x.detach() > 0,), {}
    yield ((x.detach() * 3).long().abs(),), {}
    yield ((x.detach() * 3).long().abs(), 2), {}


def calls(every: int = 1) -> Iterator[tuple[str, database.Call, database.Result]]:
    """Of every function: each n-th that it takes of the guesses, others of the next function."""
    for number, func in enumerate(get_testing_overrides()):
        name = resolve_name(func) or str(func)
        if name.startswith("torch.Tensor.__set__") or any(part in name for part in LEFT_OUT):
            continue
        for args, kwargs in list(guesses())[number % every :: every]:
            leaves, structure = tree_flatten((args, kwargs))
            call = database.Call(f"{name} {len(leaves)}", func, leaves, structure, _changes(name))
            theirs = database.run_plain(call)
            if theirs.error is None and _is_a_number(theirs.values) and _is_settled(call, theirs):
                yield name, call, theirs


def _changes(name: str) -> bool:
    bare = name.rpartition(".")[2]
    return (bare.endswith("_") and not bare.endswith("__")) or (bare.startswith("__i") and bare not in ("__iter__",))


def _is_a_number(values: list[Any]) -> bool:
    return all(isinstance(x, torch.Tensor | int | float | bool | complex | str | torch.dtype) for x in values)


def _is_settled(call: database.Call, theirs: database.Result) -> bool:
    """False if it gives something else each time: addresses, memory as it is."""
    return not database.difference(database.run_plain(call), theirs, TOLERANCE)


def judge(world: ThreadWorld, names: list[str], seen: Callable[[str, str], None], every: int = 1) -> Counter:
    """Verdicts on every n-th call, counted by their first word; `seen` is called with the function's name and each."""
    counts: Counter = Counter()
    functions: set[str] = set()
    for name, call, theirs in calls(every):
        if names and not any(part in name for part in names):
            continue
        functions.add(name)
        for place, axis in list(database.cuts_of(call, world.size))[::2]:
            found = database.verdict(world, call, place, axis, theirs, TOLERANCE)
            counts[found.partition(" ")[0]] += 1
            seen(f"{call.name}, leaf {place} axis {axis}", found)
    counts["functions"] = len(functions)
    return counts


def main() -> None:
    logging.getLogger("credit").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all by default")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()

    def seen(name: str, found: str) -> None:
        if found != "exact":
            print(f"{name}: {found}", flush=True)

    with thread_ranks(options.ranks) as world:
        print(dict(judge(world, options.names, seen)))


if __name__ == "__main__":
    main()
