"""Caches of compiled code and fonts, where several users share a machine: nobody else's are used. No torch.

Images and sites put them under /tmp, at names that anybody can foresee; torch does, too. Whoever makes such a directory
first could put code into it that is loaded here.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

VARIABLES = (
    *("XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR"),
)


def own_caches(env: MutableMapping[str, str] = os.environ) -> None:
    """Make the directories that are set ours alone (mode 700), or set others, which it says."""
    instead: dict[Path, Path] = {}
    for variable in VARIABLES:
        path = Path(env.get(variable) or "/").absolute()
        place = next((one for one in _in_public(path) if not _is_ours_alone(one)), None)
        if place is None:
            continue
        if place not in instead:
            instead[place] = Path(tempfile.mkdtemp(prefix="credit-"))
            print(f"credit: warning: {place} is not ours: caches are in {instead[place]}", file=sys.stderr, flush=True)
        env[variable] = str(instead[place] / path.relative_to(place))


def compiled_code(env: MutableMapping[str, str] = os.environ) -> None:
    """Set where torch keeps compiled code, which would be at a foreseeable name in /tmp, unchecked."""
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/credit-{os.geteuid()}/inductor")


def _in_public(path: Path) -> list[Path]:
    """The parts of a path that lie directly in a directory where everybody may write, the outer first."""
    found = []
    for part in reversed([path, *path.parents][:-1]):
        with suppress(OSError):
            if part.parent.stat().st_mode & stat.S_IWOTH:
                found.append(part)
    return found


def _is_ours_alone(place: Path) -> bool:
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if status.st_mode & 0o077:
            place.chmod(0o700)
    except FileExistsError:
        return False
    except OSError:
        return True  # read-only: nobody else writes there either
    return True
