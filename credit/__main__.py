"""`python -m credit`, and the command `credit`: one verb, and an exit code that nothing changes afterwards."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from multiprocessing import util
from typing import NoReturn

from credit.boundary import bounded
from credit.caches import own_caches
from credit.cli import main

END_S = 60.0
"""How long all that is to be done at exit may take."""


def run() -> NoReturn:
    """Run the command line, and end this process with its exit code."""
    try:
        code = bounded(own_caches) or main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    end_with(code)


def end_with(code: int) -> NoReturn:
    """Do what was left for the end, within a bound, and give the code to the launcher.

    Ranks end at different moments, and threads of torch may then abort an interpreter that is being torn down (exit
    code 134 after the work was done, and after a message was printed). Launchers act on the code: it is final here.
    """
    bound = threading.Timer(END_S, os._exit, (code,))
    bound.daemon = True
    bound.start()
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        _finalize_mpi()
    else:  # peers may be gone: but for what workers that read data share with us, of which Python would say it leaked
        util._run_finalizers(0)  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            code = code or 120  # what Python says of output that was lost
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):  # which is how `| head` ends
                with suppress(OSError, ValueError):
                    print(f"credit: error: what was printed is lost: {error}", file=sys.stderr)
    os._exit(code)


def _finalize_mpi() -> None:
    """mpi4py would do it as the interpreter ends; a launcher takes an end without it for a crash."""
    if "mpi4py.MPI" in sys.modules:
        MPI = sys.modules["mpi4py.MPI"]
        with suppress(MPI.Exception):
            if MPI.Is_initialized() and not MPI.Is_finalized():
                MPI.Finalize()


if __name__ == "__main__":
    run()
