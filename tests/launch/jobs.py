"""Jobs on the real Slurm of `tests.launch.cluster`: how tests start and watch them, and what they are compared with."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from credit.cli import main
from credit.config import parse_config
from credit.data.prepare import write_statistics
from tests import waiting
from tests.launch import cluster
from tests.stores import conf, dataset, write_zarr

ROOT = Path(__file__).parents[2]
PYTHON, BIN = sys.executable, Path(sys.executable).parent
DEADLINE_S = 240
until = partial(waiting.until, seconds=DEADLINE_S)


def write_base(folder: Path) -> Path:
    """A config in float64 with its data, and the losses of one process in `serial/`."""
    raw = conf(folder / "serial", write_zarr(folder / "s.zarr", dataset()))
    raw["data"]["stats"] = str(folder / "stats.nc")
    raw["trainer"].update(dtype="float64", parallelism={"data": "ddp", "domain": 2}, timeout=60)
    write_statistics(parse_config(raw))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path), "--set", "trainer.parallelism.domain=1"]) == 0
    return path


def environment(**more: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {name: value for name, value in cluster.env().items() if name not in dropped}
    own = {"CREDIT_VENV": str(BIN.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "", "PYTHONPATH": str(ROOT)}
    return {**env, **own, **more}


def run(*command: str | Path, timeout: float = DEADLINE_S, **more: str) -> subprocess.CompletedProcess:
    """stdout and stderr together; with `sbatch`, until the job's end, unless it is only to print the job's number."""
    words = [str(word) for word in command]
    given: dict[str, Any] = {"cwd": ROOT, "env": environment(**more), "stderr": subprocess.STDOUT}
    if words[0] == "sbatch" and "--parsable" not in words:
        return cluster.sbatch(*words[1:], seconds=timeout, **given)
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=timeout, **given)


def torchrun(nodes: int, rank: str = "0", ranks: int = 4, master: str = "n0:29577") -> list[str]:
    """One torchrun a node, of that many ranks in all."""
    address, port = master.split(":")
    there = [f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}"]
    where = there if nodes > 1 else ["--standalone"]
    return [str(BIN / "torchrun"), f"--nnodes={nodes}", f"--nproc-per-node={ranks // nodes}", *where, "-m"]


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def losses(folder: Path) -> list[tuple[str, float]]:
    return [(row["step"], float(row["loss"])) for row in log(folder)]


def training_s(folder: Path) -> float:
    """How long the steps took."""
    return sum(float(row["seconds"]) for row in log(folder))


def same_curve(base: Path, folder: Path) -> None:
    wanted, found = losses(base.parent / "serial"), losses(folder)
    assert len(wanted) == 10
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-9)


def weights(folder: Path, config: Path, options: list[str]) -> dict[str, torch.Tensor]:
    path = folder / "weights.safetensors"
    changes = ["--set", f"run={folder}", "--set", "trainer.parallelism.domain=1"]
    assert main(["export", str(config), str(path), *changes, *options]) == 0
    return load_file(path)


def bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_done(folder: Path) -> int:
    return len(losses(folder)) if (folder / "log.csv").exists() else 0


def state(folder: Path) -> str:
    file = folder / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else "none"


def ranks_of(folder: Path) -> list[int]:
    """Processes of the training into this run directory, not those of shells and srun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"credit" in words and b"train" in words and f"run={folder}".encode() in words and b"python" in words[0]:
            found.append(int(process.name))
    return sorted(found)
