"""Files that are whole or not there, whenever the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from credit.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write under another name, and give it its own once it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as stream:
        stream.write(text)
    rename_synced(partial, path)


def rename_synced(partial: Path, path: Path) -> None:
    """Give a file or directory its name, after what it holds has reached the disk; and the name reaches it, too."""
    files = [partial] if partial.is_file() else [file for file in partial.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a directory, which gets its name once all is written; what is left of a failure is removed.

    Raises:
        DataError: if there is one of the name.
    """
    if path.exists():
        raise DataError(f"{path} exists: remove it or choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield partial
        rename_synced(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """What names there are in a directory reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
