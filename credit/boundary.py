"""Between whatever may be raised and who reads it: words of ours, or one paragraph and a file. No torch.

What we foresaw is a `CreditError`. What the disk or the network did is nobody's bug: an OSError is said in words. All
else, from a user's class or from ours, is said by its type and the place it comes from; its traceback goes to a file.
"""

from __future__ import annotations

import os
import select
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from credit.errors import CreditError, HeardByFewError, Stopped, UnforeseenError
from credit.terminal import say_error

CAUGHT = (Exception, SystemExit)
"""What does not leave a verb: a module of the user's may call sys.exit, and would end a rank with a code of its own."""
SILENT_S = 3.0
"""How long a failed rank that says nothing stays: launchers end all ranks with the first, and one has yet to speak."""
LONGEST = 2000
"""Characters of a message of others that are shown: the file has them all."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""What torch says of a GPU and of the CPU, as a RuntimeError of one kind or another."""
_LESS_MEMORY = (
    "try --slices auto, trainer.accumulate or more domain ranks: `credit plan` says what each needs (docs/fit.md)"
)
_HERE = str(Path(__file__).parent) + os.sep
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_folder: Path | None = None


def leave_tracebacks_in(run: Path) -> None:
    """From here on tracebacks go to this run directory, if there is one by then; to the temporary directory before."""
    global _folder
    _folder = run


def bounded(verb: Callable[[], int | None]) -> int:
    """Run a verb; whatever it raises, but an interrupt, is said on one rank of those that know it.

    Returns:
        The exit code: the verb's; 2 for an error the user can fix; 1 for one that nobody foresaw; 75 if a signal
        stopped it and the same command goes on; 120 if its output has no reader.
    """
    try:
        return verb() or 0
    except CAUGHT as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            return 120  # as Python ends when the output of its last moment is lost
        ours = explained(error)
        if _speaks(error, ours):
            word = "stopped" if isinstance(ours, Stopped) else "error"
            with suppress(OSError, ValueError):  # there is nowhere to say it
                say_error(word, ours)
        else:
            time.sleep(SILENT_S)
        if _is_of_this_rank(error):
            from credit.launch.failure import let_others_ask

            let_others_ask(ours.what)
        return ours.exit_code


def _has_no_reader(stream: TextIO) -> bool:
    """It is a pipe whose reader has left, as `| head` does: nobody's error."""
    watch = select.poll()
    try:
        watch.register(stream, select.POLLOUT)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))


def explained(error: BaseException) -> CreditError:
    """The error itself if it is ours; otherwise one that says it, after its traceback was written to a file."""
    if isinstance(error, CreditError):
        return error
    if isinstance(error, _for_users()):
        return CreditError(str(error))
    if isinstance(error, OSError):
        return CreditError(summary(error))
    if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return CreditError(f"the memory does not suffice: {summary(error)}", fix=_LESS_MEMORY)
    return UnforeseenError(summary(error), fix=_leave_traceback(error))


def summary(error: BaseException) -> str:
    """Type, message and place, such as "ValueError: x (/home/me/model.py:12, in forward)"."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "which cannot say what it is"
    said = said if len(said) <= LONGEST else said[:LONGEST] + " ..."
    place = place_of(error)
    return f"{type(error).__name__}{': ' if said else ''}{said}" + (f" ({place})" if place else "")


def place_of(error: BaseException) -> str:
    """The innermost line of the user's own code that led there; else of ours; else of a library."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<")]
    theirs = [one for one in frames if not one.filename.startswith(_HERE) and not _is_library(one.filename)]
    ours = [one for one in frames if one.filename.startswith(_HERE)]
    chosen = (theirs or ours or frames)[-1:]
    return "".join(f"{one.filename}:{one.lineno}, in {one.name}" for one in chosen)


def _is_library(file: str) -> bool:
    return os.path.realpath(file).startswith(_LIBRARIES) or "-packages" in file


def _leave_traceback(error: BaseException) -> str:
    """Where it was written, in words."""
    text = "".join(traceback.format_exception(error)).encode(errors="backslashreplace")
    with suppress(OSError):
        if _folder is not None and _folder.is_dir():
            file = _folder / f"error-rank{_rank()}.txt"
            file.write_bytes(text)
            return f"the traceback is in {file}"
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix=f"credit-error-rank{_rank()}-", suffix=".txt")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text)
        return f"the traceback is in {name}"
    traceback.print_exception(error)
    return "the traceback is above, as it could not be written to a file"


def _rank() -> int:
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            return distributed.get_rank()
    from credit.launch.ranks import rank_said

    return rank_said()


def _for_users() -> tuple[type[Exception], ...]:
    if "torch" not in sys.modules:
        return ()
    from credit.parallel.collectives import USER_ERRORS

    return USER_ERRORS


def _speaks(error: BaseException, ours: CreditError) -> bool:
    """All ranks know the same error by now, and one says it. Without ranks this is the only process."""
    from credit.launch.ranks import speaks

    if isinstance(error, HeardByFewError):
        return error.speaks
    if _is_of_this_rank(error):
        from credit.launch.failure import is_first_to_say

        return is_first_to_say(ours.what)
    return speaks()


def _is_of_this_rank(error: BaseException) -> bool:
    """Nobody foresaw it, and the other ranks, if there are any, do not know of it."""
    return not isinstance(error, (CreditError, *_for_users())) and "torch.distributed" in sys.modules
