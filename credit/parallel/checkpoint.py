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
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from credit.errors import CheckpointError
from credit.files import sync_directory, write_atomically
from credit.parallel.collectives import gather_objects, together
from credit.parallel.ema import EMA
from credit.parallel.pieces import Pieces, in_pieces
from credit.parallel.reader import Reader
from credit.parallel.validated import best_step, read_losses, write_losses
from credit.reading import read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: (size, digest) of every file."""

    step: int
    facts: dict[str, dict[str, Any]]
    files: dict[str, tuple[int, str]]


class Checkpointer:
    """Writes the checkpoints of one run, and reads them.

    Args:
        directory: of the run's checkpoints.
        model, optimizer, ema: what is stored. The optimiser and the average may be None when only weights are read.
        facts: small and JSON; kept in the manifest, the same on all ranks.
        in_background: copy the state and go on while a thread writes it. An error comes up at the next `save`, `wait`
            or `close`, on all ranks alike.
        keep: how many of the newest stay, beside the best.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        ema: EMA | None = None,
        facts: dict[str, Any] | None = None,
        in_background: bool = False,
        keep: int = 2,
    ) -> None:
        self.directory, self.facts, self.keep = directory, facts or {}, keep
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self._thread = ThreadPoolExecutor(1) if in_background else None
        # Messages of the thread must not get between those of the training: they have a group of their own.
        several = dist.is_initialized() and in_background
        self._group = dist.new_group(backend="gloo") if several else None
        self._pending: Future[Any] | None = None

    def save(self, step: int) -> None:
        """Write `directory`/step-... and drop older ones, but the best. Called by all ranks."""
        self.wait()
        state = self._state()
        if self._thread is None:
            _write(self.directory, step, state, self.facts, self.keep, None)
            return
        copied = {block: {name: _copy(value) for name, value in values.items()} for block, values in state.items()}
        self._pending = self._thread.submit(_write, self.directory, step, copied, self.facts, self.keep, self._group)

    def validated(self, losses: dict[int, float]) -> None:
        """Keep the validation losses, of which the checkpoint of the least stays. Called by all ranks."""
        with together("writing the validation losses"):
            if _rank() == 0:
                write_losses(self.directory, losses)

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
            stored = Reader(path).read_metadata().state_dict_metadata
            if averaged and any(name.startswith("average.") for name in stored):
                plain = state["model"]  # of which buffers have no average
                mean = {name: value for name, value in plain.items() if _is_stored(f"average.{name}", stored)}
                state = {"average": mean, "model": {name: value for name, value in plain.items() if name not in mean}}
            if "optimizer" in state:  # but parameters that had no gradient yet: they get zeros
                known = {name.rpartition(".")[0] for name in stored}
                ours = state["optimizer"].items()
                state["optimizer"] = {name: x for name, x in ours if f"optimizer.{name}".rpartition(".")[0] in known}
            try:
                _quietly(dcp.load, state, storage_reader=Reader(path))
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


def _is_stored(name: str, stored: Mapping[str, Any]) -> bool:
    """True if a tensor, or pieces of it, are in a checkpoint."""
    return name in stored or any(one.startswith(f"{name}.") for one in stored)


def _write(directory: Path, step: int, state: dict[str, Any], facts: dict[str, Any], keep: int, group: Any) -> None:
    final = directory / _name(step)
    partial = directory / f".{final.name}.partial"
    with together("preparing a checkpoint", group):
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with together(f"writing the checkpoint {final}", group):
        try:
            _quietly(dcp.save, state, checkpoint_id=partial, process_group=group)
        except dcp.api.CheckpointException as error:  # no Exception, to Python
            reasons = "; ".join(f"on rank {rank}: {one}" for rank, (one, _) in sorted(error.failures.items()))
            raise CheckpointError(
                f"{reasons}. Is there room on the disk? {directory} holds the checkpoints before"
            ) from None
    digests = gather_objects(_digests(_share(partial)), group)
    files = {name: entry for share in digests for name, entry in share.items()}
    with together(f"completing the checkpoint {final}", group):
        if _rank() == 0:
            _complete(partial, final, Manifest(step, facts, dict(sorted(files.items()))), keep)


def _complete(partial: Path, final: Path, manifest: Manifest, keep: int) -> None:
    """Give a checkpoint its manifest and its name, and remove older ones."""
    write_atomically(partial / MANIFEST, json.dumps(asdict(manifest), indent=1))
    if final.exists():  # damaged, or this run was taken back to an older one
        _remove(final)
    partial.rename(final)
    sync_directory(final.parent)
    best = best_checkpoint(final.parent)
    for old in list_checkpoints(final.parent)[:-keep]:
        if old != best:
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


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MANIFEST}"))


def best_checkpoint(directory: Path) -> Path | None:
    """That of the least validation loss; None before the first validation."""
    step = best_step(read_losses(directory))
    return None if step is None else directory / _name(step)


def _name(step: int) -> str:
    return f"step-{step:08d}"


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
    manifest = read_json(path / MANIFEST, Manifest, CheckpointError, f"remove {path}")
    found = _digests(_share(path))
    present = {file.name for file in path.iterdir()}
    foreign = present - manifest.files.keys() - {MANIFEST}
    if foreign:  # torch reads some files by their names, and executes what it finds in them
        raise CheckpointError(f"{path} is damaged: its manifest does not list {', '.join(sorted(foreign))}")
    for name, (size, digest) in manifest.files.items():
        if name not in present:
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if name in found and found[name] != (size, digest):
            what = f"has {found[name][0]} bytes of {size}" if found[name][0] != size else "has changed"
            raise CheckpointError(f"{path} is damaged: {name} {what}")
    return manifest.facts


def _share(path: Path) -> list[Path]:
    """The files that this rank digests: every file is some rank's."""
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return files[_rank() :: dist.get_world_size() if dist.is_initialized() else 1]


def _digests(files: list[Path]) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found[file.name] = file.stat().st_size, digest
    return found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _quietly(function: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        # Without torch.distributed, checkpointing says that it assumes one process. So do we.
        warnings.filterwarnings("ignore", message=".*single process.*")
        function(*args, **kwargs)
