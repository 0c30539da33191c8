"""Ranks of a node read a store of globes together: the same numbers, and every chunk is decoded once."""

from __future__ import annotations

import csv
import fcntl
import multiprocessing as mp
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml

from credit.config import parse_config
from credit.data import shared
from credit.data.prepare import write_statistics
from credit.data.shared import Folder, SharedReads
from credit.data.store import FieldStore
from credit.domain_parallel.partition import Partition
from credit.launch.job import start_job
from credit.training import setup
from credit.training.setup import open_store
from tests.data.test_store import bytes_read
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve, on


def orphans() -> list[Path]:
    """Folders whose owner has gone."""
    found = []
    for folder in shared.MEMORY.glob(f"{shared.PREFIX}*"):
        try:
            with (folder / "alive").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(folder)
        except OSError:
            continue
    return found


def curve_and_what_is_left(raw: dict[str, Any]) -> tuple[list[float], float | None, list[str]]:
    """Losses, and names of files that are left in the folder of this rank's node, if it is the owner."""
    made: list[Folder] = []

    def kept() -> Folder:
        made.append(Folder())
        return made[-1]

    with patch.object(setup, "Folder", kept):
        losses, valid, _ = curve(raw)
    return losses, valid, [path.name for folder in made for path in folder.path.iterdir()]


def read_all(raw: dict[str, Any], alone: bool) -> tuple[np.ndarray, int]:
    """All states of this rank's rows, one after another, and the bytes that it read from files."""
    with start_job(lambda: parse_config(raw)) as job:
        store, _ = open_store(job)
        if alone:
            store.share(None)
        rows, channels = job.rows(store.grid.shape[0]), store.channels(["a", "b"])
        begin = bytes_read()
        fields = [store.read(channels, [time], rows) for time in range(len(store.times))]
        return np.concatenate(fields), bytes_read() - begin


@pytest.mark.parametrize(("domain", "rows_per_chunk"), [(3, 384), (2, 384), (3, 192), (3, 32)])
def test_chunks_are_decoded_once_a_node(worlds, tmp_path, domain, rows_per_chunk) -> None:
    data = dataset(states=12, grid=(384, 768))
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", data, rows_per_chunk))
    raw["data"] |= {"statics": [], "train": ["2020-01-01", "2020-01-02"]}
    write_statistics(parse_config(raw))
    whole = np.stack([data.a.values, data.b.values], axis=1)
    read = {}
    for alone in (True, False):
        found = worlds(domain).run(read_all, on(raw, tmp_path / "run", "none", domain), alone)
        for rank, (fields, _) in enumerate(found):
            rows = Partition(384, domain).range(rank)
            np.testing.assert_array_equal(fields, whole[:, :, rows.start : rows.stop])
        read[alone] = sum(count for _, count in found) / whole.nbytes
    touched = sum(
        -(-rows.stop // rows_per_chunk) - rows.start // rows_per_chunk
        for rows in (Partition(384, domain).range(rank) for rank in range(domain))
    )
    assert read[True] == pytest.approx(touched * rows_per_chunk / 384, rel=0.02)
    assert read[False] == pytest.approx(min(1, read[True]), rel=0.06)


@pytest.fixture
def raw(tmp_path) -> dict[str, Any]:
    """A run on a store of one chunk a field."""
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset(), 13), dtype="float64", epochs=2)
    raw["data"]["stats"] = str(tmp_path / "stats.nc")
    raw["model"] = {"name": "transformer", "width": 16, "depth": 1, "heads": 4, "window": 2, "ratio": 2}
    write_statistics(parse_config(raw))
    return raw


def test_a_run_is_that_of_one_process_and_leaves_nothing_in_memory(worlds, raw, tmp_path) -> None:
    losses, valid, _ = curve(on(raw, tmp_path / "one", "none", 1))
    found = worlds(4).run(curve_and_what_is_left, on(raw, tmp_path / "cut", "none", 2, 2))
    for of_rank, of_valid, _ in found:
        np.testing.assert_allclose([*of_rank, of_valid], [*losses, valid], rtol=1e-9)
    assert found[0][2] == ["alive"]


def test_workers_of_two_ranks_share(raw, tmp_path) -> None:
    losses, _, _ = curve(on(raw, tmp_path / "one", "none", 1))
    cut = on(raw, tmp_path / "cut", "none", 2)
    cut["data"]["workers"] = 2
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(cut))
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run([*torchrun, "credit", "train", str(tmp_path / "c.yaml")], check=True, timeout=300)
    with (tmp_path / "cut" / "log.csv").open() as stream:
        np.testing.assert_allclose([float(row["loss"]) for row in csv.DictReader(stream)], losses, rtol=1e-5)
    assert orphans() == []


def take_turns(folder: str, place: int, path: Path, pause: float) -> list[float]:
    """Sums of some reads; the second of two dies in the middle of one if it is told to pause for ever."""
    store = FieldStore(path)
    rows = [range(0, 7), range(7, 13)]
    store.share(SharedReads(folder, place, rows))
    sums = []
    for number in range(6):
        time.sleep(pause)
        sums.append(float(store.read(store.channels(["a"]), [number % 3], rows[place]).sum()))
    return sums


def test_one_that_comes_late_or_never_changes_nothing(tmp_path) -> None:
    path = write_zarr(tmp_path / "s.zarr", dataset(states=4), 13)
    wanted = [float(dataset(states=4).a.values[number % 3, :7].sum()) for number in range(6)]
    folder = Folder()
    with mp.get_context("forkserver").Pool(2) as pool:
        late = pool.apply_async(take_turns, (str(folder.path), 1, path, 0.05))
        assert take_turns(str(folder.path), 0, path, 0) == pytest.approx(wanted, rel=1e-6)
        late.get(60)
    assert [one.name for one in folder.path.iterdir()] == ["alive"]
    assert take_turns(str(folder.path), 0, path, 0) == pytest.approx(wanted, rel=1e-6)  # the other has gone


def test_a_lock_that_is_not_given_back_and_a_full_memory_are_no_end(tmp_path, monkeypatch) -> None:
    path = write_zarr(tmp_path / "s.zarr", dataset(states=4), 13)
    first, held = Folder(), Folder()
    wanted = take_turns(str(first.path), 0, path, 0)
    monkeypatch.setattr(shared, "PATIENCE_S", 0.05)
    monkeypatch.setattr(shared.fcntl, "flock", _refused)
    assert take_turns(str(held.path), 0, path, 0) == wanted
    monkeypatch.undo()
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda path: shared.shutil._ntuple_diskusage(1, 1, 0))
    assert take_turns(str(held.path), 0, path, 0) == wanted
    assert not [*held.path.glob("*.partial")]


def test_a_folder_that_is_not_there_or_takes_nothing_is_no_end(tmp_path, monkeypatch) -> None:
    """Ranks of one host's name without its memory; a memory that others have filled since it was asked."""
    path = write_zarr(tmp_path / "s.zarr", dataset(states=4), 13)
    first, full = Folder(), Folder()
    wanted = take_turns(str(first.path), 0, path, 0)
    assert take_turns(str(tmp_path / "nowhere"), 0, path, 0) == wanted
    monkeypatch.setattr(shared.np, "save", _fill)
    assert take_turns(str(full.path), 0, path, 0) == wanted
    assert not [*full.path.glob("*.partial")]


def _fill(stream: Any, values: np.ndarray) -> None:
    stream.write(b"some")
    raise OSError(28, "No space left on device")


def test_two_stores_of_one_process_have_folders_of_their_own(worlds, tmp_path) -> None:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset(states=12), 13))
    raw["data"] |= {"statics": [], "train": ["2020-01-01", "2020-01-02"]}
    write_statistics(parse_config(raw))
    for first, second in worlds(2).run(of_two_stores, on(raw, tmp_path / "run", "none", 2)):
        np.testing.assert_array_equal(first, second)


def of_two_stores(raw: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with start_job(lambda: parse_config(raw)) as job:
        older, _ = open_store(job)
        newer, _ = open_store(job)
        rows = job.rows(13)
        return tuple(store.read(store.channels(["a"]), [3], rows) for store in (older, newer))


def _refused(file: Any, how: int) -> None:
    raise BlockingIOError


def test_a_folder_lives_as_long_as_its_owner() -> None:
    mine = Folder()
    left = Path(f"{mine.path}-left")
    left.mkdir()
    (left / "alive").touch()
    other = Folder()
    assert mine.path.exists()
    assert not left.exists()
    where = other.path
    del other
    assert not where.exists()
    with (mine.path / "alive").open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
