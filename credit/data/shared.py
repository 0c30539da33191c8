"""What several ranks of a node read of a store that cannot be read by rows: decoded by one of them, for all.

Stores often have the whole globe in a chunk, and every domain rank would decode all of it for a few rows. But the ranks
that read the same samples ask for the same, one after another, except for the rows. So the first that comes decodes
the rows of all into a file in memory, the others take theirs from there, and the last removes it. Nothing depends on
who is first, nor on whether they share at all: only how often a chunk is decoded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

MEMORY = Path("/dev/shm")
PREFIX = f"credit-{os.getuid()}-"
PATIENCE_S = 300.0
"""How long a rank waits for the one that decodes, before it reads for itself."""
OLD_S = 3600.0
"""Nobody takes so long to make a folder."""
WASTE = 1.5
"""Rows that are decoded for each row that is read, from which on it is worth the while to share."""


class SharedReads:
    """One rank's part.

    Args:
        folder: that all of them see: a `Folder`'s path.
        place: this rank's among them.
        rows: that each of them reads.
        owned: the folder, where it is this rank's: it goes with this.
    """

    def __init__(self, folder: str, place: int, rows: Sequence[range], owned: Folder | None = None) -> None:
        self._owned = owned
        self._folder, self._place, self._rows = Path(folder), place, rows
        self.union = range(min(one.start for one in rows), max(one.stop for one in rows))
        self._turns: Counter[str] = Counter()

    def is_worth_it(self, rows_per_chunk: int) -> bool:
        """The same on all of them: whether much is decoded twice where chunks have so many rows."""

        def touched(rows: range) -> int:
            return -(-rows.stop // rows_per_chunk) - rows.start // rows_per_chunk

        return sum(map(touched, self._rows)) >= WASTE * touched(self.union)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: without the folder's ownership."""
        return {**self.__dict__, "_owned": None}

    def read(self, request: Any, decode: Callable[[range], np.ndarray], rows: range) -> np.ndarray:
        """What `decode(rows)` gives, (..., row, column).

        Args:
            request: what is to be read, but for the rows.
            decode: reads some rows.
        """
        try:
            return self._read(request, decode, rows)
        except OSError:  # of the folder, which only saves work; or of `decode`, which then says it again
            return decode(rows)

    def _read(self, request: Any, decode: Callable[[range], np.ndarray], rows: range) -> np.ndarray:
        worker = get_worker_info()
        name = hashlib.blake2b(repr(request).encode(), digest_size=12).hexdigest()
        self._turns[name] += 1
        path = self._folder / f"{name}-{self._turns[name]}-{'' if worker is None else worker.id}"
        with _locked(path.with_suffix(".lock")) as has_lock:
            if not has_lock:
                return decode(rows)
            whole = np.load(path, mmap_mode="r") if path.exists() else self._decoded(path, decode)
        part = np.array(whole[..., rows.start - self.union.start : rows.stop - self.union.start, :])
        if path.exists():
            self._take(path)
        return part

    def _decoded(self, path: Path, decode: Callable[[range], np.ndarray]) -> np.ndarray:
        """The rows of all, which are left to the others if there is room for them."""
        values = decode(self.union)
        if values.nbytes <= shutil.disk_usage(self._folder).free // 2:
            partial = path.with_suffix(".partial")
            try:
                with partial.open("wb") as stream:
                    np.save(stream, values)
                partial.rename(path)
            except OSError:  # others have taken the room
                partial.unlink(missing_ok=True)
        return values

    def _take(self, path: Path) -> None:
        """Say that this rank has what it needs; the last one removes the file."""
        path.with_suffix(f".taken{self._place}").touch()
        marks = [path.with_suffix(f".taken{place}") for place in range(len(self._rows))]
        if all(mark.exists() for mark in marks):
            for one in (path, path.with_suffix(".lock"), *marks):
                one.unlink(missing_ok=True)


class _locked:
    """Hold the lock of a file: as its value whether that came within PATIENCE_S."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> bool:
        self._file = self._path.open("a")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
            time.sleep(0.002)

    def __exit__(self, *unused: object) -> None:
        self._file.close()


class Folder:
    """A folder in the memory of this node, for as long as this process lives, or this is kept."""

    def __init__(self) -> None:
        for left in MEMORY.glob(f".{PREFIX}*"):  # by processes that were killed while they made it
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > OLD_S:
                    shutil.rmtree(left)
        for left in MEMORY.glob(f"{PREFIX}*"):  # and later
            with suppress(OSError), (left / "alive").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=MEMORY))
        self._alive = (made / "alive").open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name.lstrip(".")))  # locked before others see it
        util.Finalize(self, shutil.rmtree, (self.path, True), exitpriority=0)  # done after a failure, too
