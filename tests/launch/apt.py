"""Debian's packages. Root."""

from __future__ import annotations

import os
import subprocess
import threading

lock = threading.Lock()
"""Held while packages are installed: tools for several kinds of tests may be installed at once, and dpkg is one."""


def install(*packages: str) -> None:
    """Raises CalledProcessError, with apt's words in `stdout`."""
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    with lock:
        try:
            _call(*command)
        except subprocess.CalledProcessError:  # the lists of packages may be old, or missing
            _call("apt-get", "-q", "update")
            _call(*command)


def _call(*command: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
