"""What lives on a device, counted; and moved out of its memory while the rank that made it waits.

A dispatch mode sees every tensor that an operator is given or gives, in the backward too. So each storage that a rank
makes is known, whoever holds it: slabs, autograd's saved tensors, gradients under way, messages. When the rank hands
over, the bytes of these go elsewhere and the storages are emptied, tensors and graphs staying as they are; an operator
that is given such a tensor first has it filled again. What is saved for a backward therefore goes once, and comes once.

Not parked are: what was there before (parameters, the caller's inputs), storages of less than `LEAST` bytes, memory
that torch may not resize, and tensors whose memory was asked for (`numpy`, `data_ptr`). Code that takes tensors past
torch's dispatcher (a bare C++ extension, a compiled graph) would meet emptied ones.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from credit.domain_parallel.torch_private import TorchDispatchMode, TorchFunctionMode, no_torch_function_here

LEAST = 1 << 16
"""Bytes of a storage below which it is not worth moving."""

_AT_ONCE = 1 << 30
"""Bytes of one call to read or write, which takes less than 2 GiB."""

_ADDRESSES = frozenset(
    getattr(torch.Tensor, name)
    for name in ("numpy", "__array__", "__dlpack__", "data_ptr", "tolist", "share_memory_", "storage")
)
"""Functions that give away where a tensor's memory is, or read it past the dispatcher."""


class Live:
    """Counts the bytes of storages that are made and alive.

    Attributes:
        now, peak: at this moment, and at most.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out: they were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def meet(self, storage: Any) -> None:
        """Count it, if it is new."""
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._drop, storage._cdata, size).atexit = False
        self._add(size)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size


class Place(ABC):
    """Where parked bytes are."""

    @abstractmethod
    def put(self, storage: Any) -> Any:
        """Take the bytes of a storage; by what they are found again."""

    @abstractmethod
    def take(self, key: Any, storage: Any) -> None:
        """Fill `storage`, which is of the size that it was, with what was put."""

    @abstractmethod
    def drop(self, key: Any, size: int) -> None:
        """What was put is not needed any more."""


class HostMemory(Place):
    """The memory of the host, for a device that has its own."""

    def put(self, storage: Any) -> Any:
        return storage.cpu()

    def take(self, key: Any, storage: Any) -> None:
        storage.copy_(key)

    def drop(self, key: Any, size: int) -> None: ...


class File(Place):
    """A file without a name in the directory for temporary ones (TMPDIR): for a device whose memory is the host's."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="credit-slices-")  # noqa: SIM115 (it lives as long as this)
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def put(self, storage: Any) -> int:
        size = storage.nbytes()
        free = self._free.get(size)
        start = free.pop() if free else self._end
        for at, part in _parts(storage, size):
            if os.pwrite(self._file.fileno(), part, start + at) != len(part):
                raise OSError(f"the file for parked fields, in {tempfile.gettempdir()}, is full: set TMPDIR")
        self._end = max(self._end, start + size)
        return start

    def take(self, key: int, storage: Any) -> None:
        for at, part in _parts(storage, storage.nbytes()):
            if os.preadv(self._file.fileno(), [part], key + at) != len(part):
                raise OSError(f"the file for parked fields, in {tempfile.gettempdir()}, was cut short")

    def drop(self, key: int, size: int) -> None:
        self._free.setdefault(size, []).append(key)


def _parts(storage: Any, size: int) -> Iterator[tuple[int, Any]]:
    for at in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - at)
        yield at, (ctypes.c_char * count).from_address(storage.data_ptr() + at)


class Nowhere(Place):
    """For tensors without values."""

    def put(self, storage: Any) -> None: ...

    def take(self, key: None, storage: Any) -> None: ...

    def drop(self, key: None, size: int) -> None: ...


def place_for(device: torch.device) -> Place:
    """Where what is parked of a device rests."""
    if device.type == "meta":
        return Nowhere()
    return File() if device.type == "cpu" else HostMemory()


class Parking(Live):
    """The storages that ranks on one device have made, and where their bytes are.

    Attributes:
        parked, peak_parked: bytes that rest elsewhere, now and at most.
        moved: bytes that were moved, away and back.
    """

    def __init__(self, place: Place, least: int = LEAST) -> None:
        super().__init__()
        self.place, self.least = place, least
        self.parked = self.peak_parked = self.moved = 0
        self._here: dict[int, Any] = {}
        self._away: dict[int, tuple[Any, int]] = {}

    def meet(self, storage: Any) -> None:
        if storage in self._known:
            return
        super().meet(storage)
        if self._known[storage] >= self.least and storage.resizable():
            self._here[storage._cdata] = weakref.ref(storage)

    def park(self) -> None:
        """Move away whatever is here."""
        for key, reference in self._here.items():
            storage = reference()
            size = self._known[storage]
            self._away[key] = self.place.put(storage), size
            if not isinstance(self.place, Nowhere):
                storage.resize_(0)
            self.now -= size
            self.parked += size
            self.moved += size
        self._here.clear()
        self.peak_parked = max(self.peak_parked, self.parked)

    def need(self, storage: Any) -> None:
        """Have its bytes here. What is met so for the first time was there before."""
        if self._known.setdefault(storage, 0) and self._away:
            self._fetch(storage)

    def _fetch(self, storage: Any) -> None:
        found = self._away.pop(storage._cdata, None)
        if found is None:
            return
        key, size = found
        self._add(size)
        if not isinstance(self.place, Nowhere):
            storage.resize_(size)
        self.place.take(key, storage)
        self.place.drop(key, size)
        self.parked -= size
        self.moved += size
        self._here[storage._cdata] = weakref.ref(storage)

    def fetch_all(self) -> None:
        """Have everything here: after an error, of which a traceback may show tensors."""
        for storage in [*self._known]:
            self._fetch(storage)

    def keep(self, tensor: Tensor) -> None:
        """Leave it here from now on, as one of the caller's."""
        storage = tensor.untyped_storage()
        self.meet(storage)
        self.need(storage)
        self._here.pop(storage._cdata, None)

    def _drop(self, key: int, size: int) -> None:
        self._here.pop(key, None)
        found = self._away.pop(key, None)
        if found is None:
            super()._drop(key, size)
        else:
            self.parked -= size
            self.place.drop(*found)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, this thread's operators are given what they need here, and what they make is known."""
        with _Addresses(self), _Operators(self):
            yield


class _Operators(TorchDispatchMode):
    def __init__(self, parking: Parking) -> None:
        super().__init__()
        self._parking = parking

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parking, kwargs = self._parking, kwargs or {}
        with no_torch_function_here():
            for storage in storages((*args, *kwargs.values())):
                parking.need(storage)
            found = func(*args, **kwargs)
            for storage in storages((found,)):
                parking.meet(storage)
        return found


class _Addresses(TorchFunctionMode):
    def __init__(self, parking: Parking) -> None:
        super().__init__()
        self._parking = parking

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDRESSES and type(args[0]) is Tensor and args[0].layout is torch.strided:
            self._parking.keep(args[0])
        return func(*args, **(kwargs or {}))


def storages(values: Iterable[Any]) -> Iterator[Any]:
    """Those of the tensors in what an operator is given, or gives."""
    for x in values:
        if isinstance(x, Tensor):
            if x.layout is torch.strided:
                yield x.untyped_storage()
        elif isinstance(x, list | tuple):
            yield from storages(x)
