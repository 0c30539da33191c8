"""When a collective fails: which rank is gone, said by those that are left."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from credit.domain_parallel.torch_private import default_store
from credit.errors import HeardByFewError
from credit.layout import MeshShape, Seat, mesh_coords

ROLL_CALL_S, QUIET_S = 10.0, 1.0
"""Survivors notice a loss at about the same time: they wait for answers until none has come for a while."""
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "NCCL",
    "Read timeout",
)


class PeerLostError(HeardByFewError):
    """A rank ended or hangs; the first of those that are left says so."""


@contextmanager
def naming_lost_peers(rank: int, seats: Sequence[Seat], shape: MeshShape, timeout: float) -> Iterator[None]:
    """Turn a collective's failure into a message that names the rank, host and coordinates that do not answer."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in _LOST):
            raise
        silent = _silent(rank, len(seats))
        if silent is None:
            raise PeerLostError(f"the ranks' common store on {seats[0].host} is gone: rank 0 ended there") from error
        if not silent:
            raise
        lines = "; ".join(f"rank {lost} on {seats[lost].host} {_coords(shape, lost)}" for lost in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        first = min(set(range(len(seats))) - set(silent))
        raise PeerLostError(
            f"{lines}{more} does not answer: it ended (see its own message, or the node's log), or it has been stuck "
            f"for {timeout:g} s (trainer.timeout). Run the same command again to go on from the newest checkpoint",
            speaks=rank == first,
        ) from error


def is_first_to_say(text: str) -> bool:
    """True on one of the ranks that ask with this text: all may have met the same error, each by itself."""
    if not dist.is_initialized():
        return True
    with suppress(dist.DistError, RuntimeError):
        store = default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        return store.add(_said(text), 1) == 1
    return True


def let_others_ask(text: str) -> None:
    """Rank 0 holds the store: once it has gone, each of the others would take itself for the first."""
    if not dist.is_initialized() or dist.get_rank() != 0:
        return
    end = time.monotonic() + ROLL_CALL_S
    with suppress(dist.DistError, RuntimeError):
        while default_store().add(_said(text), 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.05)


def _said(text: str) -> str:
    return f"credit/said/{hashlib.blake2b(text.encode(errors='replace'), digest_size=8).hexdigest()}"


def _coords(shape: MeshShape, rank: int) -> str:
    coords = mesh_coords(shape, rank)
    return f"(dp {coords.dp}, tp {coords.tp}, domain {coords.domain})"


def _silent(rank: int, ranks: int) -> list[int] | None:
    """The ranks that do not come to the roll call; None if there is no store to hold it in."""
    store = default_store()
    keys = [f"credit/roll_call/{peer}" for peer in range(ranks)]
    with suppress(dist.DistError, RuntimeError):
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        store.set(keys[rank], "here")
        begin = changed = time.monotonic()
        silent: list[int] = []
        while not silent or changed + QUIET_S > time.monotonic():
            before, silent = silent, [peer for peer, key in enumerate(keys) if not store.check([key])]
            now = time.monotonic()
            if not silent or now > begin + ROLL_CALL_S:
                break
            if before != silent:
                changed = now
            time.sleep(0.1)
        return silent
    return None
