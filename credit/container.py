"""Is this process in a container? No torch."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = Path("/opt/credit")
"""Where `containers/install.sh` puts Python and all packages."""


def image() -> str | None:
    """The image that this process runs in, by name where the container says it; None outside of one."""
    for variable in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SHIFTER_IMAGE"):
        if os.environ.get(variable):
            return os.environ[variable]
    marks = ("/run/.containerenv", "/.dockerenv")
    return "a container" if any(Path(mark).exists() for mark in marks) else None


def binding_hint(path: Path) -> str:
    """For the message that `path` is not there: it may be, but outside."""
    if image() is None:
        return ""
    return f" in {image()}: start it with the directory bound (--bind {path.absolute().parent}; docker --volume)"
