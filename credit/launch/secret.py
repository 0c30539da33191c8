"""What the ranks of one start know and no other user does: in the environment, or in a file that only its owner reads.

`CREDIT_SECRET` of the environment is the first choice: launchers hand it to the ranks. Where nobody gave one,
rank 0 draws one and leaves it, for the time of the start, in files of mode 600 in the home directory and in the working
directory, of which compute nodes may lack either. Under MPI it is broadcast instead. No torch.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from credit.errors import LaunchError
from credit.launch.ranks import Claim

VARIABLE = "CREDIT_SECRET"
SHORTEST = 16
"""Characters of a secret."""
ADVICE = f"export {VARIABLE}=$(od -An -N16 -tx8 /dev/urandom | tr -d ' ') before the launcher"


def given(env: Mapping[str, str]) -> bytes | None:
    """The secret of the environment; None if it has none.

    Raises:
        LaunchError: if it is too short to be one.
    """
    value = env.get(VARIABLE, "")
    if value and len(value) < SHORTEST:
        raise LaunchError(f"{VARIABLE} has {len(value)} characters, and could be guessed: {ADVICE}")
    return value.encode() or None


def drawn() -> bytes:
    """A new one."""
    return secrets.token_hex(16).encode()


def places(claim: Claim) -> list[Path]:
    """The files in which rank 0 leaves the secret of this start."""
    name = hashlib.blake2b(f"{claim.source} {claim.job} {claim.first_host}".encode(), digest_size=8).hexdigest()
    found = [Path(f".credit-start-{name}").absolute()]
    with suppress(RuntimeError):  # nobody knows of a home
        found.insert(0, Path.home() / ".credit" / f"start-{name}")
    return found


@contextmanager
def left(files: list[Path]) -> Iterator[bytes]:
    """A new secret, which lies in these files until the ranks have met.

    Raises:
        LaunchError: if none of them can be written, or kept from others.
    """
    secret = drawn()
    written, problems = [], []
    for file in files:
        try:
            _leave(secret, file)
            written.append(file)
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
    try:
        if not written:
            raise LaunchError(f"rank 0 can leave the ranks' common secret nowhere ({'; '.join(problems)}): {ADVICE}")
        yield secret
    finally:
        for file in written:
            with suppress(OSError):
                file.unlink()


def found(files: list[Path]) -> list[bytes]:
    """The secrets that lie there now, without those that another user may have put there."""
    return [secret for file in files if (secret := _read(file)) is not None]


def _leave(secret: bytes, file: Path) -> None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as stream:
        try:
            if not _is_ours(stream.fileno()):
                raise OSError("the file system lets others read it")
            stream.write(secret)
            stream.flush()
            draft.replace(file)
        except OSError:
            draft.unlink()
            raise


def _read(file: Path) -> bytes | None:
    try:
        os.listdir(file.parent)  # a network file system believes for a while that a file is not there
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            secret = stream.read(256) if _is_ours(stream.fileno()) else b""
    except OSError:
        return None
    return secret if len(secret) >= SHORTEST else None


def _is_ours(file: int) -> bool:
    """True for a plain file of this user that nobody else may read or write."""
    status = os.fstat(file)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
