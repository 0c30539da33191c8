"""The first call of every group, made by all of its ranks at once and within a bound.

NCCL makes a group's communicators at its first call, for which it waits on all ranks of the group. If that call is an
exchange of rows in which one rank takes no part (721 rows over 4 ranks, exchanged for 724, leave rank 0 out), the
others wait for ever.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter

import torch
import torch.distributed as dist

from credit.domain_parallel.torch_private import default_store

MEETING_S = 600.0
"""How long the ranks of a group may take, unless told otherwise."""
_warmings: Counter[str] = Counter()


def warm(name: str, group: dist.ProcessGroup, device: str, timeout: float = MEETING_S) -> str | None:
    """Let the ranks of a group add up a number on their devices. Called by all of them.

    Args:
        name: of the group, the same on all its ranks; in no other one of that name is any of them.
        device: the type of the devices between which they move tensors.
        timeout: seconds that they may take.

    Returns:
        None if all have met; otherwise what to say of it, with the ranks that did not come.
    """
    ranks, store = dist.get_process_group_ranks(group), default_store()
    _warmings[name] += 1
    keys = {rank: f"credit/warm/{name}/{_warmings[name]}/{rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], socket.gethostname())
    problem = _problem(group, device, timeout)
    if problem is None:
        return None
    hosts = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
    there = ", ".join(f"{rank} ({host})" for rank, host in hosts.items())
    absent = ", ".join(str(rank) for rank in ranks if rank not in hosts)
    who = f"{there} came, and {absent} did not" if absent else f"{there} came, which is all"
    return (
        f"the ranks of a {name} group did not meet on their devices ({device}): of its ranks {who}; {problem}. Look at "
        f"the first error of a rank that did not come; if all came, at the links between the devices: NCCL_DEBUG=INFO "
        f"says what is tried, and NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 does without one"
    )


def _problem(group: dist.ProcessGroup, device: str, timeout: float) -> str | None:
    """What kept the ranks from meeting, if anything did."""
    found: list[str | None] = []
    at = torch.device(device) if device == "cpu" else torch.device(device, torch.accelerator.current_device_index())

    def meet() -> None:
        try:
            total = torch.ones((), device=at)
            dist.all_reduce(total, group=group)
            ranks = int(total)  # a device only says that it is done when it is asked for the number
            size = dist.get_world_size(group)
            found.append(None if ranks == size else f"ones of {size} ranks add up to {ranks}")
        except (RuntimeError, dist.DistError) as error:
            found.append((str(error).strip() or type(error).__name__).splitlines()[0])

    # In a thread, since a communicator that is being made cannot be told to stop.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0] if found else f"nothing came in {timeout:g} s"
