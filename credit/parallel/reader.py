"""Reads torch's distributed checkpoints without running what is in them.

Their list of contents is a pickle, which torch loads whatever it names, and entries that are no tensors are others.
Whoever may write such a file could run code as the one who reads it.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from credit.errors import CheckpointError

_KNOWN: dict[str, Collection[str]] = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath",),
}
"""What the list of contents of a checkpoint names, by module."""


class Reader(dcp.FileSystemReader):
    """Of a checkpoint that holds tensors and nothing else.

    Raises:
        CheckpointError: if it names anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            try:
                found = _Contents(file, Path(self.path)).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
                raise CheckpointError(f"{self.path} has no list of contents that can be read: {error}") from None
        if not isinstance(found, Metadata):
            raise CheckpointError(f"{self.path} has no list of contents, but {type(found).__name__}")
        others = [name for name, kind in found.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
        if others:
            raise CheckpointError(f"{self.path} holds {', '.join(others[:4])}, which is no tensor, and is not read")
        found.storage_meta = found.storage_meta or dcp.metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Contents(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # as early versions of Python 3.11 write members of an Enum
            return self._member
        if name not in _KNOWN.get(module, ()):
            raise CheckpointError(
                f"{self.path} names {module}.{name}, which is no part of a checkpoint and may run code: it is not read"
            )
        return super().find_class(module, name)

    def _member(self, kind: Any, name: str) -> Any:
        if not isinstance(kind, EnumMeta):
            raise CheckpointError(f"{self.path} takes {name} of {kind!r}, which may run code: it is not read")
        return kind[name]
