"""Ranks that are threads of one process: the same numbers and the same traffic as processes, without a process.

    with thread_ranks(3) as world:
        results = world.run(function, *args)      # function(*args) on every rank; the results, by rank

One rank runs at a time. It runs until it needs what another has not given yet, and then the next rank that can go on
does, in a fixed order: two runs are alike to the last message. If none can go on, that is a deadlock, and is
said at once. The random generators of torch, numpy and Python belong to a rank; all start where the caller's stand.

Inside, `get_domain_parallel_manager()` is the manager of one domain group of all ranks, and `world.group(ranks)` is the
group of some of them.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.generators import Generators
from credit.domain_parallel.groups import Messages, RankGroup, Reduction
from credit.domain_parallel.manager import DomainParallelManager, as_rank
from credit.domain_parallel.slab import whereabouts
from credit.domain_parallel.torch_private import inside_backward


class DeadlockError(RuntimeError):
    """No rank can go on. Says who waits for what, and where."""


class RankError(RuntimeError):
    """One or more ranks raised.

    Attributes:
        errors: by rank, with what they said; ranks that only waited for those are left out.
    """

    def __init__(self, errors: dict[int, BaseException]) -> None:
        self.errors = errors
        lines = [f"--- rank {rank}\n{''.join(traceback.format_exception(error))}" for rank, error in errors.items()]
        super().__init__("\n".join(lines))

    @property
    def alike(self) -> BaseException | None:
        """What all of them raised, if that is the same."""
        first, *others = self.errors.values()
        same = all(type(other) is type(first) and str(other) == str(first) for other in others)
        return first if same else None


class _AbandonedError(DeadlockError):
    """This rank waits for one that has failed."""


@contextmanager
def thread_ranks(size: int) -> Iterator[ThreadWorld]:
    """A world of `size` ranks that are threads of this process."""
    yield ThreadWorld(size)


def _closed() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class _Rank:
    """What the world knows of a rank.

    Attributes:
        may_run: opened when it is its turn. A lock is cheap where a semaphore is Python's own code.
        ready: whether it has what it waits for; None while it does not wait.
        awaits: what that is, in words.
        in_backward: it waits in a backward.
        generators: where its random generators stand, while it does not run.
        ended: it has returned or failed.
    """

    generators: Generators
    may_run: threading.Lock = field(default_factory=_closed)
    thread: threading.Thread | None = None
    ready: Callable[[], bool] | None = None
    awaits: str = ""
    in_backward: bool = False
    ended: bool = False
    result: Any = None
    error: BaseException | None = None

    @property
    def can_run(self) -> bool:
        return not self.ended and (self.ready is None or self.ready())


@dataclass
class _Box:
    """What the ranks of one group have given each other and not taken yet.

    Attributes:
        called: how many collectives each rank has called.
        given: to each of them, by its number: what each rank called, and gave.
        taken: how many ranks have what they were to get of it.
        messages: in order, by (from, to, in a backward): none sent in a forward can be taken for one of a backward.
    """

    called: Counter[int] = field(default_factory=Counter)
    given: dict[int, dict[int, tuple[str, Tensor]]] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    messages: dict[tuple[int, int, bool], list[Tensor]] = field(default_factory=dict)

    def empty(self) -> None:
        for part in (self.called, self.given, self.taken, self.messages):
            part.clear()


class ThreadWorld:
    """See `thread_ranks`.

    Attributes:
        size: how many ranks.
        at_hand_over: called by a rank before another runs.
    """

    def __init__(self, size: int, at_hand_over: Callable[[], None] = lambda: None) -> None:
        self.size, self.at_hand_over = size, at_hand_over
        self._ranks: list[_Rank] = []
        self._generators = [Generators() for _ in range(size)]
        self._boxes: dict[tuple[int, ...], _Box] = {}
        self._stuck: DeadlockError | None = None
        self._running = threading.local()

    @property
    def rank(self) -> int:
        """Of the thread that asks."""
        return self._running.rank

    def group(self, ranks: Sequence[int] | None = None) -> RankGroup:
        """This rank's view of a group of `ranks`, itself among them; of all by default."""
        members = tuple(range(self.size) if ranks is None else ranks)
        return ThreadRanks(self, self._boxes.setdefault(members, _Box()), members, members.index(self.rank))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """function(*args, **kwargs) on every rank: the results, by rank.

        In a rank autograd is on if it is on here; other modes of torch are a thread's own, and off.

        Raises:
            RankError: if a rank raises.
            DeadlockError: if ranks wait for each other, or a message was sent that nobody received.
        """
        before = Generators()
        for generators in self._generators:
            generators.stand_where(before)
        for box in self._boxes.values():  # which groups of an earlier run have, too
            box.empty()
        self._stuck = None
        self._ranks = [_Rank(generators) for generators in self._generators]
        grad = torch.is_grad_enabled()
        for number, rank in enumerate(self._ranks):
            rank.thread = threading.Thread(
                target=self._live, args=(number, grad, function, args, kwargs), name=f"rank {number}", daemon=True
            )
            rank.thread.start()
        try:
            self._ranks[0].may_run.release()
            for rank in self._ranks:
                assert rank.thread is not None
                rank.thread.join()
        finally:
            before.restore()
        self._raise_errors()
        return [rank.result for rank in self._ranks]

    def _raise_errors(self) -> None:
        errors = {number: rank.error for number, rank in enumerate(self._ranks) if rank.error is not None}
        causes = {number: error for number, error in errors.items() if not isinstance(error, DeadlockError)}
        if causes:
            raise RankError(causes)
        if errors:
            raise next(iter(errors.values()))
        for members, box in self._boxes.items():
            for (source, target, _), left in box.messages.items():
                if left:
                    raise DeadlockError(
                        f"rank {members[source]} sent rank {members[target]} {_described(left[0])}, which it never "
                        f"received"
                    )

    def _live(
        self, number: int, grad: bool, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        rank = self._ranks[number]
        rank.may_run.acquire()
        self._running.rank = number
        try:
            # The backward of tensors on a GPU, too, runs in the thread that asks for it.
            alone = torch.autograd.set_multithreading_enabled(False)
            with as_rank(DomainParallelManager.of_group(self.group())), torch.set_grad_enabled(grad), alone:
                rank.generators.restore()
                rank.result = function(*args, **kwargs)
                self.at_hand_over()
        except BaseException as error:
            rank.error = error
        rank.ended = True
        self._hand_over(number)

    def until(self, ready: Callable[[], bool], awaits: str) -> None:
        """Let others run until `ready()`, which only they can bring about."""
        if ready():
            return
        number = self.rank
        rank = self._ranks[number]
        self.at_hand_over()
        rank.ready, rank.awaits, rank.in_backward = ready, awaits, inside_backward()
        rank.generators.save()
        self._hand_over(number)
        rank.may_run.acquire()
        rank.ready = None
        if not ready():
            self._stuck = self._stuck or self._deadlock()
            raise self._stuck
        rank.generators.restore()

    def _hand_over(self, number: int) -> None:
        """The next rank that can run does; if none can, one that waits is told that it waits in vain."""
        order = [self._ranks[(number + step) % self.size] for step in range(1, self.size + 1)]
        following = next((rank for rank in order if rank.can_run), None)
        following = following or next((rank for rank in order if not rank.ended), None)
        if following is not None:
            following.may_run.release()

    def _deadlock(self) -> DeadlockError:
        """Who waits for what, and where: all ranks are told the same."""
        lines = []
        for number, rank in enumerate(self._ranks):
            if rank.ended:
                lines.append(f"rank {number} has {'failed' if rank.error is not None else 'ended'}")
                continue
            assert rank.thread is not None
            module, place = whereabouts(sys._current_frames()[rank.thread.ident or 0])
            where = "the backward" if rank.in_backward else module
            lines.append(f"rank {number} waits for {rank.awaits}, in {where}{place}")
        kind = _AbandonedError if any(rank.error is not None for rank in self._ranks) else DeadlockError
        return kind("no rank can go on:\n" + "\n".join(lines))


class ThreadRanks(RankGroup):
    """Some ranks of a `ThreadWorld`."""

    def __init__(self, world: ThreadWorld, box: _Box, members: tuple[int, ...], rank: int) -> None:
        super().__init__(rank, len(members))
        self._world, self._box, self._members = world, box, members

    def _check_caller(self) -> None:
        mine, asking = self._members[self.rank], self._world.rank
        if mine != asking:
            raise RuntimeError(
                f"rank {asking} uses the group of rank {mine}: ranks that are threads must not share a converted "
                f"model; give each a copy of the plain one"
            )

    def _all_reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        given = self._collect(f"all_reduce ({reduction}) of", values)
        if reduction == "max":
            return torch.stack(given).amax(0)
        return ring_sum(given)

    def _all_gather(self, values: Tensor) -> Tensor:
        return torch.stack(self._collect("all_gather of", values))

    def _collect(self, what: str, values: Tensor) -> list[Tensor]:
        """What every rank gives to this collective.

        Raises:
            DeadlockError: if the ranks call different collectives, or with tensors of different shapes or types.
        """
        self._check_caller()
        box = self._box
        number = box.called[self.rank]
        box.called[self.rank] += 1
        call = f"{what} {_described(values)}"
        given = box.given.setdefault(number, {})
        given[self.rank] = call, values.detach().clone(memory_format=torch.contiguous_format)
        self._world.until(lambda: len(given) == self.size, f"the other ranks of {self._members} in an {call}")
        if len({call for call, _ in given.values()}) > 1:
            calls = "\n".join(f"rank {self._members[rank]}: {call}" for rank, (call, _) in sorted(given.items()))
            raise DeadlockError(f"ranks call different collectives:\n{calls}")
        box.taken[number] = box.taken.get(number, 0) + 1
        if box.taken[number] == self.size:
            del box.given[number], box.taken[number]
        return [given[rank][1] for rank in range(self.size)]

    def _start(self, outgoing: dict[int, Tensor], incoming: dict[int, list[int]], like: Tensor) -> Messages:
        self._check_caller()
        for peer, tensor in outgoing.items():
            self._queue(self.rank, peer).append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return Messages(lambda: {peer: self._received(peer, shape, like) for peer, shape in incoming.items()})

    def _received(self, peer: int, shape: list[int], like: Tensor) -> Tensor:
        expected = like.new_empty(shape)
        if not expected.numel():
            return expected
        queue = self._queue(peer, self.rank)
        self._world.until(lambda: bool(queue), f"a message of rank {self._members[peer]}, {_described(expected)}")
        message = queue.pop(0)
        if _described(message) != _described(expected):
            raise DeadlockError(
                f"rank {self._members[self.rank]} waits for {_described(expected)}, and rank {self._members[peer]} "
                f"sends {_described(message)}"
            )
        return message

    def _queue(self, source: int, target: int) -> list[Tensor]:
        return self._box.messages.setdefault((source, target, inside_backward()), [])


def ring_sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, in the order in which gloo's ring adds up those of as many ranks, to the last bit.

    The tensors are split into as many chunks as there are ranks. A chunk starts on the rank before the one where its
    sum is to end, and goes round backwards; each rank adds its own. Chunks are whole numbers of segments, at least two
    a rank and at most a megabyte each (gloo/allreduce.cc, `ring`).
    """
    size, first = len(values), values[0]
    if size <= 2:
        return sum(values[1:], first.clone())
    item = first.element_size()
    most = 1024 * 1024 // item * item
    segments = max(ceil(first.nbytes / most), 2 * size)
    segments = ceil(segments / size) * size
    segment = ceil(ceil(first.nbytes / segments) / item)
    chunk = segment * (segments // size)
    flat = [value.reshape(-1) for value in values]
    total = torch.empty_like(first)
    for owner in range(size):
        part = slice(owner * chunk, (owner + 1) * chunk)
        partial = flat[owner - 1][part]
        for step in range(2, size + 1):
            partial = partial + flat[(owner - step) % size][part]
        total.view(-1)[part] = partial
    return total


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
