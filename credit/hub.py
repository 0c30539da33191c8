"""Trained models by name: from a directory, or a repository of the Hugging Face hub; and back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from credit.errors import CreditError
from credit.evaluation.package import CONFIG, FILES, WEIGHTS, refuse_changed
from credit.evaluation.trained import Trained

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def from_pretrained(source: str | Path, revision: str | None = None, trust: bool = False) -> Trained:
    """The model of a directory that `credit export` wrote, or of a repository that holds one.

    Args:
        source: a directory, also as file://; else a repository such as "organisation/name".
        revision: of the repository: a branch, a tag or a commit.
        trust: see `Trained`.

    Raises:
        CreditError: if it is neither, or huggingface_hub is not installed.
        CheckpointError: see `Trained`.
    """
    local = _local(source)
    if local is None:
        local = Path(_hub().snapshot_download(str(source), revision=revision, allow_patterns=[*FILES]))
    return Trained(local, trust)


def push(directory: str | Path, to: str | Path, message: str = "A model of credit") -> str:
    """Copy a model's directory, to another or to a repository, which is made if need be.

    Args:
        to: a directory that is not there yet (with a slash in front, ./ or file://), or a repository.

    Returns:
        Where it is now.

    Raises:
        CreditError: if the directory holds no model, or there is something at `to`.
        CheckpointError: if a file is not the one that was certified.
    """
    source = Path(directory)
    if not all((source / name).is_file() for name in (WEIGHTS, CONFIG)):
        raise CreditError("holds no model that `credit export` wrote", str(source))
    refuse_changed(source)
    names = [name for name in FILES if (source / name).exists()]
    if isinstance(to, Path) or to.startswith(("file://", "/", ".")):
        target = _path(to)
        if target.exists():
            raise CreditError("is there already", str(target), "choose another directory")
        target.mkdir(parents=True)
        for name in names:
            shutil.copyfile(source / name, target / name)
        return str(target)
    if not REPOSITORY.fullmatch(to):
        raise CreditError(f"{to!r} is neither a directory nor a repository such as organisation/name")
    hub = _hub()
    hub.create_repo(to, exist_ok=True)
    return str(hub.upload_folder(repo_id=to, folder_path=source, allow_patterns=names, commit_message=message))


def _local(source: str | Path) -> Path | None:
    """The directory; None for a repository."""
    path = _path(source)
    if path.is_dir():
        return path
    if isinstance(source, str) and REPOSITORY.fullmatch(source):
        return None
    raise CreditError(f"{source} is neither a directory nor a repository such as organisation/name")


def _path(source: str | Path) -> Path:
    if isinstance(source, str) and source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    return Path(source)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise CreditError("huggingface_hub is not installed", fix="pip install 'credit-hpc[hub]'") from None
    return huggingface_hub
