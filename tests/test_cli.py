"""The command line as a user meets it: one process, real files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from credit.cli import main
from tests.stores import conf, dataset, write_zarr


def test_help_is_quick_because_it_imports_no_torch() -> None:
    script = (
        "import sys, json\n"
        "try:\n    from credit.cli import main; main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "xarray", "pydantic", "mpi4py", "rich"}
    assert "torchrun --nproc-per-node 4 -m credit train configs/quickstart.yaml" in done.stdout


def test_domain_parallel_needs_torch_alone() -> None:
    script = "import sys, credit.domain_parallel; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "credit.domain_parallel" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"xarray", "zarr", "pydantic", "mpi4py", "netCDF4", "yaml"}
    ours = {name for name in loaded if name.startswith("credit.") and not name.startswith("credit.domain_parallel")}
    assert ours == set()


def test_the_whole_chain_in_one_process(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    store = write_zarr(tmp_path / "s.zarr", dataset(levels=(500.0,)))
    raw = conf(Path("run"), store)
    raw["data"].update(variables=["a", "c"], levels=[500])
    Path("c.yaml").write_text(yaml.safe_dump(raw))
    before = {path for path in tmp_path.rglob("*") if "s.zarr" in path.parts}

    assert main(["train", "c.yaml"]) == 2
    assert "there are no statistics at run/stats.nc: run `credit data stats CONFIG`" in capsys.readouterr().err
    assert main(["data", "stats", "c.yaml"]) == 0
    assert "c_500: mean" in capsys.readouterr().out
    assert main(["train", "c.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "40 times on 13 x 16" in said
    assert "data.train: 23 samples" in said
    assert main(["train", "c.yaml"]) == 0
    assert "step 10/10" in capsys.readouterr().out
    assert main(["forecast", "c.yaml"]) == 0
    assert main(["score", "c.yaml"]) == 0
    assert "c_500        24 h" in capsys.readouterr().out
    assert main(["report", "c.yaml", "--to", "out/page.html"]) == 0
    assert main(["report", "c.yaml", "--to", "out"]) == 2
    page = Path("out/page.html").read_text()
    Path("out/page.html").unlink()
    Path("out").rmdir()
    assert Page.of(page).headings == ["run", "Training", "Scores", "Maps", "Spectra", "Timings and traffic", "Config"]
    assert len(Page.of(page).pictures) == 4
    assert all(one.startswith("data:image/png;base64,") for one in Page.of(page).pictures)
    assert "dp 1 x tp 1 x domain 1" in page
    with Path("run/scores.csv").open(newline="") as stream:
        rmse = {tuple(row[k] for k in ("channel", "lead_hours", "forecast")): row for row in csv.DictReader(stream)}
    model, persistence = (float(rmse["c_500", "24", one]["rmse"]) for one in ("model", "persistence"))
    assert f">{100 * (1 - model / persistence):+.0f} %<" in page
    assert f">{model:.4g}<" in page

    made = {path.name for path in Path("run").iterdir()}
    assert made >= {"stats.nc", "log.csv", "valid.csv", "checkpoints", "forecast.zarr", "scores.csv", "map.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "s.zarr", "c.yaml"}
    assert {path for path in tmp_path.rglob("*") if "s.zarr" in path.parts} == before


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("4", "4 ranks: dp 2 x tp 1 x domain 2"),
        ("5", "5 ranks do not divide into replicas of tensor 1 x domain 2 = 2 ranks: start 4 or 6 ranks"),
    ],
)
def test_a_dry_run_is_a_check(tmp_path, capsys, ranks, message) -> None:
    path = tmp_path / "c.yaml"
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()))
    raw["trainer"]["parallelism"] = {"data": "ddp", "domain": 2}
    path.write_text(yaml.safe_dump(raw))
    main(["data", "stats", str(path)])
    code = main(["train", str(path), "--dry-run", "--ranks", ranks])
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert "traceback" not in said.out + said.err
    assert code == int(ranks == "5")
    assert ("13 latitudes, 6 to 7 a rank" in said.out) == (ranks == "4")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_report_needs_a_run_and_says_what_is_damaged(tmp_path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()))))
    assert main(["report", str(path)]) == 2
    assert "run `credit train` first" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    for content in (b"", b"step,loss\n1,x\n", b"\xff\x00", b"step\n"):
        (tmp_path / "run" / "log.csv").write_bytes(content)
        assert main(["report", str(path)]) == 2
        assert "log.csv" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()


class Page(HTMLParser):
    """What a page holds, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.headings: list[str] = []
        self._tag = ""

    @classmethod
    def of(cls, text: str) -> Page:
        page = cls()
        page.feed(text)
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        assert tag not in ("script", "link", "iframe")
        given = dict(attrs)
        self.pictures += [given["src"] or ""] if "src" in given else []
        assert (given.get("href") or "#").startswith("#")

    def handle_data(self, data: str) -> None:
        if self._tag in ("h1", "h2") and data.strip():
            self.headings.append(data.strip())


def test_forecast_and_score_say_what_is_to_be_done_first(tmp_path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()))))
    main(["data", "stats", str(path)])
    assert main(["forecast", str(path)]) == 2
    assert "run `credit train` first" in capsys.readouterr().err
    assert main(["score", str(path)]) == 2
    assert "run `credit forecast` first" in capsys.readouterr().err


def test_a_site_says_what_devices_a_plan_is_for(capsys) -> None:
    assert main(["plan", "configs/quickstart.yaml", "--site", "perlmutter"]) == 0
    of_site = capsys.readouterr().out
    assert main(["plan", "configs/quickstart.yaml", "--gpus", "4", "--gpu-memory", "40"]) == 0
    assert of_site == capsys.readouterr().out
    assert main(["plan", "configs/quickstart.yaml", "--site", "perlmutter", "--nodes", "2"]) == 0
    assert "8" in {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()}


@pytest.mark.parametrize("devices", [[], ["--gpus", "4"], ["--site", "generic_slurm"]])
def test_a_plan_for_unknown_devices_is_refused(devices: list[str], capsys) -> None:
    assert main(["plan", "configs/quickstart.yaml", *devices]) == 2
    assert "Give --gpus and --gpu-memory, or a --site that knows its GPUs' memory" in capsys.readouterr().err
