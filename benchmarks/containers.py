"""How fast the image starts, against bare Python beside it: cold processes, alternated, medians.

    python benchmarks/containers.py credit.sif

No torch must be imported on the way, which tests/test_cli.py holds; here are the times.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
COMMANDS = {
    "python -c pass": ["python", "-c", "pass"],
    "import credit": ["python", "-c", "import credit"],
    "credit --help": ["credit", "--help"],
}


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main(image: str) -> None:
    prefix = ["apptainer", "--silent", "exec", image]
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds([*prefix, *command]))
    bare = statistics.median(times["python -c pass"])
    print(f"{'in the image':16} {'seconds':>8} {'beyond bare Python':>19} {'ratio':>6}")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:16} {median:8.3f} {median - bare:19.3f} {median / bare:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
