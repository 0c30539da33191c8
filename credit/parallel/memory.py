"""How much memory is left on a device."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_OF_GROUP = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group (versions 2 and 1): its limit, what it uses, and what of that are files that can be dropped."""


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a device's memory.

    On the CPU: the least of what the machine has left, the container's limit, and this process's (`ulimit -v`, `-d`).
    """
    if device.type != "cpu":
        return torch.get_device_module(device).mem_get_info(device)[0]
    return max(0, min(_left()))


def _left() -> Iterator[int]:
    yield 1024 * _field(Path("/proc/meminfo"), "MemAvailable:")
    used = Path("/proc/self/status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - 1024 * _field(used, name)
    for limit_file, current, files in _OF_GROUP:
        path = Path("/sys/fs/cgroup", limit_file)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            taken = int(Path("/sys/fs/cgroup", current).read_text())
            yield int(text) - taken + _field(path.with_name("memory.stat"), files)


def _field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
