"""Where torch casts operands by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Where autocast is on.

    Attributes:
        on: types of devices, each with the dtype that it casts to.
        caches: it keeps its casts of weights.
    """

    on: tuple[tuple[str, torch.dtype], ...] = ()
    caches: bool = True

    @classmethod
    def now(cls) -> Autocast:
        on = ((kind, torch.get_autocast_dtype(kind)) for kind in device_types() if torch.is_autocast_enabled(kind))
        return cls(tuple(on), torch.is_autocast_cache_enabled())

    def again(self) -> ExitStack:
        """A context in which it is as it was."""
        stack, kinds = ExitStack(), dict(self.on)
        for kind in device_types():
            on = kind in kinds
            if on or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, kinds.get(kind), enabled=on, cache_enabled=self.caches))
        return stack


NONE = Autocast()


@cache
def device_types() -> tuple[str, ...]:
    """The CPU, and the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def casts() -> bool:
    """It is on somewhere."""
    return any(map(torch.is_autocast_enabled, device_types()))


@contextmanager
def casts_of_its_own() -> Iterator[None]:
    """Autocast keeps its casts of weights for what follows, where their gradients would be added up in half precision:
    not from one forward to the next, whether or not the caller's context lasts that long."""
    if not casts():
        yield
        return
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
