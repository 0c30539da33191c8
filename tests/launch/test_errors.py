"""Bad input, with real ranks: one paragraph that says what and where, exit code 2 on every rank, no hang."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from credit import boundary
from credit.config import parse_config
from credit.data.prepare import write_statistics
from credit.parallel.checkpoint import list_checkpoints
from tests.stores import conf, dataset, write_zarr

DEADLINE_S = 240
_context = multiprocessing.get_context("forkserver")  # the one of tests.ranks, which imports torch ahead


def start_ranks(config: Path, size: int, *more: str) -> tuple[list[int], list[str]]:
    """`credit train` on `size` processes as torchrun would start them; exit codes and stderr of each.

    They are forked from a process that has imported torch already: it takes seconds, and these tests start many.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory(prefix="credit-errors-") as folder:
        files, processes = [Path(folder, str(rank)) for rank in range(size)], []
        for rank, file in enumerate(files):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            env = {**{name: str(value) for name, value in place.items()}, "MASTER_PORT": str(port)}
            env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # the forkserver has its own
            process = _context.Process(target=_credit, args=(["train", str(config), *more], env, file))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + DEADLINE_S
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        late = [process.kill() for process in processes if process.is_alive()]
        assert not late, f"{len(late)} ranks did not end in {DEADLINE_S} s"
        return [process.exitcode for process in processes], [file.read_text() for file in files]


def _credit(arguments: list[str], env: dict[str, str], errors: Path) -> None:
    """`python -m credit`, in this process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # see tests.ranks
    os.environ.update(env)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    boundary.SILENT_S = 0  # it leaves the others time to speak before a launcher ends them, and there is none
    torch.set_num_threads(1)
    sys.argv = ["credit", *arguments]
    runpy.run_module("credit", run_name="__main__", alter_sys=True)


def refused(codes: list[int], errors: list[str]) -> str:
    """The one paragraph, after checking that every rank failed and only rank 0 spoke, without a traceback."""
    assert codes == [2] * len(codes), errors
    assert not any("Traceback" in text for text in errors), errors
    said = [line for text in errors for line in text.splitlines() if line.startswith("credit: error: ")]
    assert len(said) == 1, errors
    return said[0]


@pytest.fixture
def raw(tmp_path) -> dict:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()))
    raw["trainer"]["parallelism"] = {"data": "none", "domain": 2}
    write_statistics(parse_config(raw))
    return raw


def written(raw: dict, directory: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_an_unknown_key_and_a_wrong_type(raw, tmp_path) -> None:
    raw["trainer"]["learning_rat"] = 0.1
    raw["trainer"]["batch_size"] = "many"
    said = refused(*start_ranks(written(raw, tmp_path), 2))
    assert "config.yaml: " in said
    assert "trainer.learning_rat: unknown key; did you mean 'learning_rate'?" in said
    assert "trainer.batch_size: input should be a valid integer" in said
    assert "got 'many'" in said


def test_a_world_that_does_not_divide(raw, tmp_path) -> None:
    said = refused(*start_ranks(written(raw, tmp_path), 3))
    assert "3 ranks do not divide into replicas of tensor 1 x domain 2 = 2 ranks: start 2 or 4 ranks" in said


def test_replicas_that_nothing_would_join(raw, tmp_path) -> None:
    said = refused(*start_ranks(written(raw, tmp_path), 4))
    assert "4 ranks make 2 replicas, which data: none would train apart" in said


def test_a_missing_store(raw, tmp_path) -> None:
    raw["data"]["path"] = str(tmp_path / "nowhere.zarr")
    said = refused(*start_ranks(written(raw, tmp_path), 2))
    assert f"there is no {tmp_path}/nowhere.zarr (data.path" in said


def test_a_config_that_one_host_has_not(raw, tmp_path) -> None:
    """Ranks that see different files: here rank 1 is given another directory."""
    said = refused(*start_ranks(tmp_path / "elsewhere.yaml", 2))
    assert "elsewhere.yaml: cannot be read: No such file or directory" in said


def test_nan_in_the_rows_of_one_rank(raw, tmp_path) -> None:
    """Rank 1 alone meets it, in the first epoch; rank 0 stops with rank 1's words."""
    data = dataset()
    data.b[9, 12, 5] = np.nan
    write_zarr(tmp_path / "s.zarr", data)
    said = refused(*start_ranks(written(raw, tmp_path), 2))
    assert "reading a batch failed on rank 1: " in said
    assert "s.zarr: b is nan at 2020-01-03T06:00, latitude -90, longitude 112.5" in said


def own_model(raw: dict, directory: Path, body: str, monkeypatch) -> Path:
    """A model of the user's own, in a file that the ranks import."""
    (directory / "their_model.py").write_text(
        "import torch.distributed as dist\nfrom torch import nn\n\nclass Net(nn.Conv2d):\n"
        f"    def __init__(self, inputs, outputs, grid):\n        super().__init__(inputs, outputs, 1)\n{body}"
    )
    monkeypatch.setenv("PYTHONPATH", str(directory))
    raw["model"] = {"name": "their_model.Net"}
    return directory / "their_model.py"


def test_a_model_that_raises_on_one_rank(raw, tmp_path, monkeypatch) -> None:
    """Rank 0 says it for all, with the line and the file that rank 1 has left."""
    body = "        if dist.get_rank() == 1:\n            raise KeyError('odd')\n"
    file = own_model(raw, tmp_path, body, monkeypatch)
    codes, errors = start_ranks(written(raw, tmp_path), 2)
    assert codes == [1, 1], errors
    said = [line for text in errors for line in text.splitlines() if line.startswith("credit: error: ")]
    assert len(said) == 1, errors
    assert f"building the model failed on rank 1: KeyError: 'odd' ({file}:8, in __init__)" in said[0]
    assert f"the traceback is in {tmp_path}/run/error-rank1.txt" in said[0]
    assert "KeyError: 'odd'" in (tmp_path / "run" / "error-rank1.txt").read_text()
    assert not any("Traceback" in text for text in errors), errors


@pytest.mark.parametrize("late_s", [0, 4])
def test_a_model_that_raises_in_a_step_is_said_once(raw, tmp_path, monkeypatch, late_s) -> None:
    """On all ranks alike, where none knows of the others; and if rank 1 comes to it when rank 0 has long said it."""
    body = "        self.calls = 0\n    def forward(self, x):\n        self.calls += 1\n"
    body += f"        if self.calls > 12:\n            import time; time.sleep({late_s} * dist.get_rank())\n"
    body += "            raise ZeroDivisionError\n        return super().forward(x)\n"
    file = own_model(raw, tmp_path, body, monkeypatch)
    codes, errors = start_ranks(written(raw, tmp_path), 2)
    said = [line for text in errors for line in text.splitlines() if line.startswith("credit: error: ")]
    assert codes == [1, 1], errors
    assert len(said) == 1, errors
    assert f"ZeroDivisionError ({file}:12, in forward); the traceback is in {tmp_path}/run/error-rank" in said[0]
    assert not any("Traceback" in text for text in errors), errors


def test_a_truncated_checkpoint(raw, tmp_path) -> None:
    codes, errors = start_ranks(written(raw, tmp_path), 2)
    assert codes == [0, 0], errors
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        file = sorted(checkpoint.glob("*.distcp"))[-1]
        size = file.stat().st_size
        os.truncate(file, size // 2)
    said = refused(*start_ranks(written(raw, tmp_path), 2))
    assert checkpoint.name == "step-00000010"
    assert f"{checkpoint} is damaged: {file.name} has {size // 2} bytes of {size}" in said
    assert f"Remove {checkpoint.parent} to start again" in said


def test_a_run_directory_of_another_config(raw, tmp_path) -> None:
    small = ("--set", "trainer.epochs=1")
    assert start_ranks(written(raw, tmp_path), 2, *small)[0] == [0, 0]
    said = refused(*start_ranks(written(raw, tmp_path), 2, *small, "--set", "data.variables=[a]"))
    assert "data.variables was ['a', 'b'] and is ['a']" in said


def test_the_store_used_is_the_one_that_was_written(tmp_path) -> None:
    """Guards the fixture: a poisoned time is one that training reads."""
    data = dataset()
    assert data.time.values[9] == np.datetime64("2020-01-03T06:00")
    assert xr.open_zarr(write_zarr(tmp_path / "s.zarr", data), consolidated=False).sizes["time"] == 40
