"""Checkpoints and weights that others wrote do not run code here."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.metadata import Metadata

from credit.errors import CheckpointError
from credit.parallel.reader import Reader, _Contents
from credit.parallel.weights import _read


class Trap:
    """Pickled, it touches a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    dcp.save({"model": nn.Linear(3, 4).state_dict()}, checkpoint_id=tmp_path / "c", no_dist=True)
    return tmp_path / "c"


def test_the_contents_of_a_checkpoint_are_read_as_torch_reads_them(checkpoint) -> None:
    ours, theirs = Reader(checkpoint).read_metadata(), dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_a_trap_in_the_contents_of_a_checkpoint(checkpoint, tmp_path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=r"names pathlib\.Path\.touch|names builtins\.getattr"):
        Reader(checkpoint).read_metadata()
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(AttributeError):  # guards the test: torch's own reader takes it
        dcp.FileSystemReader(checkpoint).read_metadata()
    assert (tmp_path / "sprung").exists()


def test_a_trap_among_the_tensors_of_a_checkpoint(tmp_path) -> None:
    state = {"model": {"weight": torch.ones(2), "trap": Trap(tmp_path / "sprung")}}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(CheckpointError, match=r"holds model\.trap, which is no tensor"):
        Reader(tmp_path / "c").read_metadata()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps([])])
def test_contents_that_are_none(checkpoint, data) -> None:
    (checkpoint / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match="no list of contents"):
        Reader(checkpoint).read_metadata()


def test_a_trap_in_weights(tmp_path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        _read(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert list(_read(tmp_path / "w.safetensors")) == ["w"]


class _Written(pickle.Pickler):
    """Members of an Enum as early versions of Python 3.11 write them."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def test_contents_that_another_python_wrote_are_read_and_getattr_takes_nothing_else(tmp_path) -> None:
    def contents(thing: Any) -> Any:
        file = io.BytesIO()
        _Written(file).dump(thing)
        file.seek(0)
        return _Contents(file, tmp_path).load()

    kept = MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert contents([kept]) == [kept]
    with pytest.raises(CheckpointError, match=r"takes __init__ of .*, which may run code"):
        contents(_Trap())


class _Trap:
    def __reduce__(self) -> Any:
        return getattr, (Metadata, "__init__")
