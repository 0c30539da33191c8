"""Checkpoints written by all ranks with torch's distributed checkpoint; a kill leaves the last good one usable.

A checkpoint is a directory `step-00000100` with a manifest of the sizes and digests of its files. It is written
under another name and renamed when it is complete, so what has the right name is whole. It can be read back on
any mesh: parameters, optimiser states and averages are stored whole, under the plain model's names, each rank writing
the pieces that it holds (see `credit.parallel.pieces`). Samplers, learning rates and random numbers are functions of
the step, so the step is all there is to store of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from credit.errors import CheckpointError
from credit.parallel.collectives import gather_objects, together
from credit.parallel.ema import EMA
from credit.parallel.pieces import Pieces, in_pieces, whole

MANIFEST = "manifest.json"
KEEP = 2


class Checkpointer:
    """Writes the checkpoints of one run, and reads them.

    Args:
        directory: of the run's checkpoints.
        model, optimizer, ema: what is stored. The optimiser and the average may be None when only weights are read.
        facts: small and JSON; kept in the manifest, the same on all ranks.
        in_background: copy the state and go on while a thread writes it. An error comes up at the next `save`, `wait`
            or `close`, on all ranks alike.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        ema: EMA | None = None,
        facts: dict[str, Any] | None = None,
        in_background: bool = False,
    ) -> None:
        self.directory, self.facts = directory, facts or {}
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self._thread = ThreadPoolExecutor(1) if in_background else None
        # Messages of the thread must not get between those of the training: they have a group of their own.
        several = dist.is_initialized() and in_background
        self._group = dist.new_group(backend="gloo") if several else None
        self._pending: Future | None = None

    def save(self, step: int) -> None:
        """Write `directory`/step-... and drop all but the last two. Called by all ranks."""
        self.wait()
        state = self._state()
        if self._thread is None:
            _write(self.directory, step, state, self.facts, None)
            return
        copied = {block: {name: _copy(value) for name, value in values.items()} for block, values in state.items()}
        self._pending = self._thread.submit(_write, self.directory, step, copied, self.facts, self._group)

    def wait(self) -> None:
        """Return once the checkpoint being written is complete.

        Raises:
            CreditError: on every rank, if writing it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def load(self, path: Path, averaged: bool = False) -> None:
        """Read a checkpoint into the model, and into the optimiser and the average if there are any. On any mesh.

        Args:
            averaged: read the average, where the checkpoint has one, as the model's weights.

        Raises:
            CheckpointError: on every rank, naming the parameter that does not fit.
        """
        with together(f"reading the checkpoint {path}"):
            state = self._state()
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            if averaged and any(name.startswith("average.") for name in stored):
                state = {"average": state["model"]}
            if "optimizer" in state:  # but parameters that had no gradient yet: they get zeros
                known = {name.rpartition(".")[0] for name in stored}
                ours = state["optimizer"].items()
                state["optimizer"] = {name: x for name, x in ours if f"optimizer.{name}".rpartition(".")[0] in known}
            try:
                _quietly(dcp.load, state, checkpoint_id=path)
            except (dcp.api.CheckpointException, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1]
                raise CheckpointError(f"{path} does not fit the model: {reason}. Was it of another config?") from None
            # Tensors were read into in place; an optimiser that had no state yet was given one of zeros.

    def _state(self) -> dict[str, dict[str, Any]]:
        """Everything by block and name, in the pieces that this rank holds."""
        state = {"model": in_pieces(self.model, get_model_state_dict(self.model))}
        if self.optimizer is not None:
            of_optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer)["state"]
            flat = {f"{name}.{kind}": value for name, kinds in of_optimizer.items() for kind, value in kinds.items()}
            state["optimizer"] = in_pieces(self.model, flat)
        if self.ema is not None:
            state["average"] = in_pieces(self.model, self.ema.average)
        return state


def _write(directory: Path, step: int, state: dict[str, Any], facts: dict[str, Any], group: Any) -> None:
    final = directory / f"step-{step:08d}"
    partial = directory / f".{final.name}.partial"
    with together("preparing a checkpoint", group):
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with together(f"writing the checkpoint {final}", group):
        _quietly(dcp.save, state, checkpoint_id=partial, process_group=group)
    digests = gather_objects(_digests(_share(partial)), group)
    files = {name: entry for share in digests for name, entry in share.items()}
    with together(f"completing the checkpoint {final}", group):
        if _rank() == 0:
            _complete(partial, final, {"step": step, "facts": facts, "files": dict(sorted(files.items()))})


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give a checkpoint its manifest and its name, and remove older ones."""
    with (partial / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    if final.exists():  # damaged, or this run was taken back to an older one
        _remove(final)
    partial.rename(final)
    for old in list_checkpoints(final.parent)[:-KEEP]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Take its name away first: a kill half-way must not leave something that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _copy(value: Any) -> Any:
    if isinstance(value, Pieces):
        return value.copied()
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def export_plain(model: nn.Module, path: Path, state: dict[str, Any] | None = None) -> None:
    """Write the plain model's state dict into one file that `torch.load` reads. Called by all ranks.

    Args:
        model: on any mesh.
        state: in its place, as `get_model_state_dict(model)` or `EMA.average` is.
    """
    pieces = in_pieces(model, get_model_state_dict(model) if state is None else state)
    # One tensor at a time is made whole, so that no rank but the first holds them all.
    plain = {name: full.cpu() for name, value in pieces.items() if (full := whole(value)) is not None and _rank() == 0}
    with together(f"writing {path}"):
        if _rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            torch.save(plain, partial)
            partial.rename(path)


def load_plain(model: nn.Module, path: Path) -> None:
    """Read a plain state dict into a plain model, on any number of ranks, before it is laid out on a mesh.

    Raises:
        CheckpointError: naming the file, and what is missing, unknown or of another shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model.load_state_dict(state)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror or error}") from None
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:600]
        raise CheckpointError(f"{path} does not hold this model's weights: {reason}") from None


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MANIFEST}"))


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare the files with the manifest, each rank its share of them. Called by all ranks.

    Returns:
        The manifest's `facts`.

    Raises:
        CheckpointError: on every rank, naming the file that is damaged.
    """
    facts, problem = None, None
    try:
        facts = _verify(path)
    except CheckpointError as error:
        problem = str(error)
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path} is damaged: {type(error).__name__}: {error}"
    said = [one for one in gather_objects(problem) if one is not None]
    if said:
        raise CheckpointError(said[0])
    assert facts is not None
    return facts


def newest_good_checkpoint(directory: Path, say: Any = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are what its manifest says, and its facts. Called by all ranks.

    Args:
        say: is told of each damaged one that is passed over.

    Raises:
        CheckpointError: on every rank, if there are checkpoints and all are damaged, or the ranks see different ones.
    """
    found = gather_objects([path.name for path in list_checkpoints(directory)])
    if any(names != found[0] for names in found):
        raise CheckpointError(f"the ranks see different checkpoints in {directory}: {found}. Do they share the disk?")
    reasons = []
    for name in reversed(found[0]):
        try:
            return directory / name, verify_checkpoint(directory / name)
        except CheckpointError as error:
            reasons.append(str(error))
            say(f"{error}; going back to the one before")
    if reasons:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(reasons)}. Remove {directory} to start again")
    return None


def _verify(path: Path) -> dict[str, Any]:
    """Check this rank's share of the files against the manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    found = _digests(_share(path))
    present = {file.name for file in path.iterdir()}
    foreign = present - manifest["files"].keys() - {MANIFEST}
    if foreign:  # torch reads some files by their names, and executes what it finds in them
        raise CheckpointError(f"{path} is damaged: its manifest does not list {', '.join(sorted(foreign))}")
    for name, (size, digest) in manifest["files"].items():
        if name not in present:
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if name in found and found[name] != [size, digest]:
            what = f"has {found[name][0]} bytes of {size}" if found[name][0] != size else "has changed"
            raise CheckpointError(f"{path} is damaged: {name} {what}")
    return manifest["facts"]


def _share(path: Path) -> list[Path]:
    """The files that this rank digests: every file is some rank's."""
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return files[_rank() :: dist.get_world_size() if dist.is_initialized() else 1]


def _digests(files: list[Path]) -> dict[str, list]:
    found = {}
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found[file.name] = [file.stat().st_size, digest]
    return found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _quietly(function: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        # Without torch.distributed, checkpointing says that it assumes one process. So do we.
        warnings.filterwarnings("ignore", message=".*single process.*")
        function(*args, **kwargs)
