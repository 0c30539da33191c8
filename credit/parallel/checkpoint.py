"""Checkpoints written by all ranks with torch's distributed checkpoint; a kill leaves the last good one usable.

A checkpoint is a directory `step-00000100` with a manifest of the sizes and digests of its files. It is written
under another name and renamed when it is complete, so what has the right name is whole. It can be read back on
any mesh: parameters are stored under the plain model's names.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from credit.errors import CheckpointError
from credit.parallel.collectives import gather_objects, together

MANIFEST = "manifest.json"
KEEP = 2


def save_checkpoint(directory: Path, step: int, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any]) -> Path:
    """Write `directory`/step-... and drop all but the last two. Called by all ranks.

    Args:
        facts: small and JSON; kept in the manifest, the same on all ranks.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".{final.name}.partial"
    with together("preparing a checkpoint"):
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with together(f"writing the checkpoint {final}"):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        _quietly(dcp.save, {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    files = {name: entry for share in gather_objects(_digests(_share(partial))) for name, entry in share.items()}
    with together(f"completing the checkpoint {final}"):
        if _rank() == 0:
            manifest = {"step": step, "facts": facts, "files": dict(sorted(files.items()))}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            partial.rename(final)
            for old in list_checkpoints(directory)[:-KEEP]:
                shutil.rmtree(old)
    return final


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
    with together(f"checking the checkpoint {path}"):
        return _verify(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Read a checkpoint into `model`, and `optimizer` unless it is None. Called by all ranks, on any mesh.

    Raises:
        CheckpointError: on every rank, naming the parameter that does not fit.
    """
    with together(f"reading the checkpoint {path}"):
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
        if optimizer is not None:
            state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        try:
            _quietly(dcp.load, state, checkpoint_id=path)
        except (dcp.api.CheckpointException, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{path} does not fit the model: {reason}. Was it of another config?") from None
        if optimizer is None:
            set_model_state_dict(model, state["model"])
        else:
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _verify(path: Path) -> dict[str, Any]:
    """Check this rank's share of the files against the manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    found = _digests(_share(path))
    present = {file.name for file in path.iterdir()}
    for name, (size, digest) in manifest["files"].items():
        if name not in present:
            raise CheckpointError(f"{path} is damaged: {name} is missing. {_way_back(path)}")
        if name in found and found[name] != [size, digest]:
            what = f"has {found[name][0]} bytes of {size}" if found[name][0] != size else "has changed"
            raise CheckpointError(f"{path} is damaged: {name} {what}. {_way_back(path)}")
    return manifest["facts"]


def _way_back(path: Path) -> str:
    older = [one for one in list_checkpoints(path.parent) if one < path]
    then = f"continue from {older[-1].name}" if older else "start again"
    return f"Delete {path} to {then}"


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
