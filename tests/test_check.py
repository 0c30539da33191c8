"""`credit check parity` as a user meets it: one paragraph, an exit code; real processes, where they could differ."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from credit.checks.preflight import preflight
from credit.cli import main
from credit.config import load_config
from credit.domain_parallel import DomainParallelError, ParityReport
from tests.stores import conf, dataset, write_empty, write_zarr

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
DEMOS = sorted(CONFIGS.glob("*_demo.yaml"))
GRIDS = {"1deg": (181, 360), "0p25deg": (721, 1440)}
LARGE = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem.rpartition("_")[2] in GRIDS]
DEADLINE_S = 300


def check(*words: str, where: Path, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun else []
    command = [sys.executable, *launcher, "-m", "credit", "check", "parity", *words]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, env=env, cwd=where, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a store with levels, of which no statistics have been made."""
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset(levels=(500.0, 850.0))))
    raw["data"].update(variables=["a", "c"], levels=[500, 850])
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_quickstart_is_exact_on_two_ranks_and_nothing_is_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "parity", str(QUICKSTART), "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert "unet on 5 -> 3 random fields of 61 x 120" in said
    assert "parity over 2 domain ranks, torch.float64: exact to 1e-09" in said
    assert "parameter gradient        57" in said
    assert said.count("parity over") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_the_demos_are_exact_on_two_ranks(path: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "parity", str(path), "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert "random fields of 61 x 120" in said
    assert "parity over 2 domain ranks, torch.float64: exact to 1e-09" in said


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_configs_are_accepted_for_a_store_that_has_their_fields(path: Path, tmp_path) -> None:
    store = tmp_path / "era5.zarr"
    write_empty(store, load_config(path).data, GRIDS[path.stem.rpartition("_")[2]])
    changes = [f"data.path={store}", f"data.stats={store.with_suffix('.nc')}", f"run={tmp_path / 'run'}"]
    findings = preflight(str(path), changes, 32)
    wrong = [finding for finding in findings if finding.severity != "ok"]
    assert [finding.where for finding in wrong] == ["data.train", "data.valid", "data.test"]
    assert all("was never written" in finding.message for finding in wrong)  # the store has nothing in it
    assert any("a rank needs" in finding.message for finding in findings)


def test_fields_are_read_at_the_ends_of_each_period(config) -> None:
    """One value of `a` is missing at the last start of the validation, and one of `c` at the first of the test."""
    data = dataset(levels=(500.0, 850.0))
    raw = yaml.safe_load(config.read_text())
    assert main(["data", "stats", str(config)]) == 0
    data["a"][28, 3, 4] = np.nan
    data["c"][30, 1, 5, 6] = np.inf
    write_zarr(Path(raw["data"]["path"]), data)
    wrong = [finding for finding in preflight(str(config), [], None) if finding.severity != "ok"]
    assert [finding.where for finding in wrong] == ["data.valid", "data.test"]
    assert "a is nan at 2020-01-08T00:00" in wrong[0].message
    assert "c at level 850 is inf at 2020-01-08T12:00" in wrong[1].message


def test_there_are_demos_and_large_configs() -> None:
    assert len(DEMOS) == 3
    assert {path.stem.rpartition("_")[2] for path in LARGE} == set(GRIDS)


def test_a_store_of_ones_own_under_torchrun(config) -> None:
    done = check(str(config), "--ranks", "2", where=config.parent, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert "unet on 6 -> 3 random fields of 13 x 16" in done.stdout
    assert done.stdout.count("parity over 2 domain ranks") == 1
    assert not (config.parent / "run").exists()


def test_a_missing_store_is_one_paragraph(config) -> None:
    done = check(str(config), "--ranks=2", "--set", "data.path=nowhere.zarr", where=config.parent)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("credit: error: there is no nowhere.zarr (data.path") == 1
    assert "the check needs the store for its grid and channels alone" in done.stderr


NO_PROCESS = """
import sys
def see(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"):
        sys.exit(f"{event} {args}")
sys.addaudithook(see)
from credit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_are_threads_and_no_process_is_started(config) -> None:
    command = [sys.executable, "-c", NO_PROCESS, "check", "parity", str(config), "--ranks", "3"]
    done = subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "parity over 3 domain ranks, torch.float64: exact to 1e-09" in done.stdout


def test_channels_are_cut_too(capsys) -> None:
    assert main(["check", "parity", str(DEMOS[-1]), "--ranks", "4", "--set", "trainer.parallelism.tensor=2"]) == 0
    assert "parity over 2 domain ranks, torch.float64: exact to 1e-09" in capsys.readouterr().out


def test_what_has_no_sharded_form_is_refused_on_request(config, capsys) -> None:
    command = ["check", "parity", str(config), "--ranks", "2", "--set", "model.name=tests.parallel.test_plan.Ranked"]
    assert main(command) == 0
    assert "gathered: Ranked: torch.linalg.svdvals has no sharded form; " in capsys.readouterr().out
    assert main([*command, "--set", "trainer.fallback=refuse"]) == 2
    assert "torch.linalg.svdvals cannot be done on a field cut over ranks" in capsys.readouterr().err


def test_one_rank_says_that_nothing_is_cut(config, capsys) -> None:
    assert main(["check", "parity", str(config)]) == 0
    assert "parity on one rank (nothing is cut: plain is plain)" in capsys.readouterr().out


def test_what_is_not_exact_exits_with_1(config, capsys, monkeypatch) -> None:
    report = ParityReport(2, torch.float64, 1e-9, {"output 0": 0.5}, {}, "down.0", 0.25)
    monkeypatch.setattr("credit.checks.parity.verify_parity_at", lambda *args, **kwargs: report)
    assert main(["check", "parity", str(config)]) == 1
    assert "They part first at down.0, whose output is off by 2.5e-01" in capsys.readouterr().out


def test_a_refusal_exits_with_2(config, capsys, monkeypatch) -> None:
    def refuse(*args, **kwargs) -> None:
        raise DomainParallelError("down.0: torch.linalg.svd cannot be done")

    monkeypatch.setattr("credit.checks.parity.verify_parity_at", refuse)
    assert main(["check", "parity", str(config)]) == 2
    assert capsys.readouterr().err == "credit: error: down.0: torch.linalg.svd cannot be done\n"


def test_help_has_an_example(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "parity", "--help"])
    assert left.value.code == 0
    assert "credit check parity configs/quickstart.yaml --ranks 3" in capsys.readouterr().out
