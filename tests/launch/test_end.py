"""The exit code is final before the interpreter is torn down; what is left for the end is done, within a bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.exits import exit_codes, write_short

ABORTS = """
import ctypes
c = ctypes.CDLL(None)
c.__cxa_atexit(c.abort, None, None)  # as a thread of C++ that was not joined
"""
THREADS = """
import threading, time, torch
from torch.distributed import HashStore
store, started = HashStore(), threading.Event()
def work():
    while True:
        store.set("a", "b")
        store.get("a")
        started.set()
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
started.wait()
"""
PROMISED = """
import atexit, threading, time
atexit.register(print, "handler")
threading.Thread(target=lambda: time.sleep(0.3) or print("thread")).start()
"""
HANGS = """
import atexit, time
import credit.__main__ as end
end.END_S = 0.5
atexit.register(time.sleep, 600)
"""


def ended(code: str, **more: object) -> subprocess.CompletedProcess:
    given = {"stdout": subprocess.PIPE, "text": True, "timeout": 120, **more}
    return subprocess.run([sys.executable, "-E", "-c", code], **given)


def with_code(code: int) -> str:
    return f"\nfrom credit.__main__ import end_with\nend_with({code})"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_is_torn_down_afterwards_does_not_change_the_code(code) -> None:
    assert ended(ABORTS).returncode == -6  # the interpreter's own end
    assert ended(ABORTS + with_code(code)).returncode == code


def test_threads_that_are_in_torch_do_not_abort_the_end() -> None:
    """What ended one of thirteen good jobs with 134: "terminate called without an active exception"."""
    theirs = ended(THREADS, stderr=subprocess.PIPE)
    assert (theirs.returncode, "terminate called without an active exception" in theirs.stderr) == (-6, True)
    assert ended(THREADS + with_code(0)).returncode == 0


def test_what_was_left_for_the_end_is_done() -> None:
    done = ended(PROMISED + with_code(0))
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["handler", "thread"])


def test_an_end_that_hangs_is_bounded() -> None:
    assert ended(HANGS + with_code(0)).returncode == 0


def test_output_that_was_lost_is_no_success() -> None:
    with Path("/dev/full").open("w") as full:
        assert ended("print('x')" + with_code(0), stdout=full).returncode == 120
        assert ended("print('x')" + with_code(2), stdout=full).returncode == 2


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--nope"], 2), (["status", "nowhere.yaml"], 2), (["layout"], 2)]
)
def test_the_codes_of_the_command_line(words, code) -> None:
    assert subprocess.run([sys.executable, "-m", "credit", *words], capture_output=True).returncode == code


def test_trainings_end_with_0(tmp_path) -> None:
    """A sample; `python -m tests.launch.exits` counts 200 runs beside a load."""
    config = write_short(tmp_path)
    for number in range(2):
        assert exit_codes(config, tmp_path / str(number), 2) == [0, 0]
