"""What a run leaves beside its checkpoints: TensorBoard's scalars are those of the CSV files; traces of steps."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from credit.checks.preflight import preflight
from credit.config import parse_config
from credit.errors import ConfigError
from credit.launch.job import start_job
from credit.training.log import refuse_missing_tensorboard
from credit.training.profile import Profile
from credit.training.train import train
from tests.ranks import RankError
from tests.training.runs import curve, interrupted, on, small


@pytest.fixture
def raw(tmp_path) -> dict:
    given = small(tmp_path)
    given["trainer"].update(epochs=1, tensorboard=True)
    return given


def columns(path: Path) -> dict[str, list[float]]:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_scalars_are_those_of_the_csv_files_and_once_only_after_a_resume(raw) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted(raw, 4)  # after step 4, which comes again: the checkpoint is of step 3
    curve(raw)
    run = Path(raw["run"])
    found = events.EventAccumulator(str(run / "tensorboard")).Reload()
    for group, name in (("train", "log.csv"), ("valid", "valid.csv")):
        written = columns(run / name)
        steps = written.pop("step")
        if group == "valid":
            written.pop("epoch")
        for column, values in written.items():
            scalars = found.Scalars(f"{group}/{column}")
            assert [scalar.step for scalar in scalars] == steps
            assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-3, abs=1e-4)
    assert steps == [5]


@contextmanager
def no_tensorboard() -> Iterator[None]:
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "tensorboard" else real(name, *more)
    try:
        yield
    finally:
        importlib.util.find_spec = real


def curve_without(raw: dict) -> None:
    with no_tensorboard():
        curve(raw)


def test_all_ranks_stop_where_it_is_not_installed(worlds, raw, tmp_path) -> None:
    with pytest.raises(RankError, match=r"is not installed; pip install 'credit-hpc\[tracking\]'") as caught:
        worlds(2).run(curve_without, on(raw, tmp_path / "run", "none", 2))
    assert len(caught.value.errors) == 2
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    with no_tensorboard():
        findings = preflight(str(tmp_path / "c.yaml"), [], None)
        refuse_missing_tensorboard(False)
        with pytest.raises(ConfigError, match=r"^trainer\.tensorboard: "):
            refuse_missing_tensorboard(True)
    assert [one.severity for one in findings if one.where == "trainer.tensorboard"] == ["error"]


def profiled(raw: dict, steps: int) -> list[float]:
    with start_job(lambda: parse_config(raw)) as job:
        return train(job, profile=steps).losses


def test_a_profile_is_a_chrome_trace_of_so_many_steps_of_rank_0(worlds, raw, tmp_path) -> None:
    raw["trainer"]["tensorboard"] = False
    plain, *_ = worlds(2).run(curve, on(raw, tmp_path / "plain", "none", 2))[0]
    for losses in worlds(2).run(profiled, on(raw, tmp_path / "profiled", "none", 2), 2):
        assert losses == plain
    (trace,) = (tmp_path / "profiled").glob("profile-*.json")
    assert trace.name == "profile-00000003.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    assert "aten::convolution" in names
    assert any("all_reduce" in name for name in names)


def test_what_is_there_is_written_when_a_run_ends_before(tmp_path) -> None:
    for steps, written in ((1, 0), (3, 1)):
        with Profile(tmp_path, 10 * steps, 5, active=True) as recorded:
            for _ in range(steps):
                recorded.step()
        assert len(list(tmp_path.glob(f"profile-{10 * steps + 3:08d}.json"))) == written
    with Profile(tmp_path, 0, 5, active=False) as recorded:
        recorded.step()
    assert not (tmp_path / "profile-00000003.json").exists()
