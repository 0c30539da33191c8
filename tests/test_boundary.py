"""What is raised, and what is said of it: words of ours, or one paragraph, the place, and a file with the traceback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from credit import boundary
from credit.boundary import bounded, place_of
from credit.cli import main
from credit.config import load_config, parse_config
from credit.data.prepare import write_statistics
from credit.errors import CheckpointError, ConfigError, DataError, LaunchError, Stopped, UnforeseenError
from credit.launch.failure import PeerLostError
from credit.launch.rendezvous import NotMetError
from credit.parallel.checkpoint import MANIFEST, list_checkpoints, newest_good_checkpoint
from credit.reading import parse_yaml, read_yaml
from credit.status import FILE, read_status
from credit.steps import parse_step
from credit.training.log import StepLog
from tests.stores import conf, dataset, write_zarr

THEIRS = '''
import sys
import torch
from torch import nn

class Raises(nn.Module):
    """How: when it is built, or when it is called; KeyError, or sys.exit(0)."""
    def __init__(self, in_channels, out_channels, grid, when="build", leave=False, rank=None):
        super().__init__()
        self.layer, self.when, self.leave = nn.Conv2d(in_channels, out_channels, 1), when, leave
        if when == "build":
            self.end()

    def end(self):
        if self.leave:
            sys.exit(0)
        raise KeyError("two\\n\\nlines")

    def forward(self, x):
        if self.when == "call":
            self.end()
        return self.layer(x)
'''


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch) -> None:
    """Tracebacks of the test's own, and nobody who waits for others."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(boundary, "_folder", None)
    monkeypatch.setattr(boundary, "SILENT_S", 0)


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    """A module of the user's own."""
    file = tmp_path / "their_model.py"
    file.write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("their_model", None)
    return file


def raising(error: BaseException):
    def verb() -> None:
        raise error

    return verb


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*error-rank*"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("is odd", "trainer.x", "take another"), 2, "credit: error: trainer.x: is odd; take another\n"),
        (Stopped("at step 3"), 75, "credit: stopped: at step 3\n"),
        (OSError(errno.ENOSPC, "No space left on device", "log.csv"), 2, "credit: error: OSError: .* No space .*log"),
        (ValueError("a\n  b"), 1, r"credit: error: ValueError: a b \(.*test_boundary.py:\d+, in verb\); the traceback"),
        (SystemExit(0), 1, r"credit: error: SystemExit: 0 \(.*test_boundary.py"),
        (RecursionError(), 1, r"credit: error: RecursionError \(.*test_boundary.py"),
    ],
)
def test_every_error_is_one_paragraph_and_a_code(error, code, said, tmp_path, capsys) -> None:
    assert bounded(raising(error)) == code
    seen = capsys.readouterr().err
    assert re.match(said, seen)
    assert seen.count("\n") == 1
    written = files_in(tmp_path)
    assert len(written) == (code == 1)
    assert all(str(file) in seen and "in verb" in file.read_text() for file in written)


def test_an_interrupt_is_nobodys_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        bounded(raising(KeyboardInterrupt()))


def test_the_traceback_lies_in_the_run_directory_with_the_rank(tmp_path, monkeypatch, capsys) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boundary, "_speaks", lambda *_: True)
    boundary.leave_tracebacks_in(tmp_path / "run")
    assert bounded(raising(ValueError("early"))) == 1  # there is no such directory yet
    assert files_in(tmp_path)[0].name.startswith("credit-error-rank3-")
    (tmp_path / "run").mkdir()
    assert bounded(raising(ValueError("late"))) == 1
    assert f"the traceback is in {tmp_path}/run/error-rank3.txt" in capsys.readouterr().err
    assert "ValueError: late" in (tmp_path / "run" / "error-rank3.txt").read_text()


def test_where_no_file_can_be_the_traceback_is_printed(monkeypatch, capsys) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    assert bounded(raising(ValueError("x"))) == 1
    seen = capsys.readouterr().err
    assert seen.startswith("Traceback")
    assert "the traceback is above" in seen


def test_an_error_of_ours_goes_to_others_whole() -> None:
    import pickle

    problems = [ConfigError("missing", "a.b"), ConfigError("odd", "c", "even")]
    one = (LaunchError("x", "y", "z"), ConfigError("p; q", "f.yaml", problems=problems), UnforeseenError("u"))
    for error in (*one, PeerLostError("v", speaks=False), NotMetError("w", speaks=False)):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), back.where, back.fix) == (type(error), str(error), error.where, error.fix)
        if isinstance(error, ConfigError):
            assert [str(one) for one in back.problems] == ["a.b: missing", "c: odd; even"]
        assert getattr(back, "speaks", None) == getattr(error, "speaks", None)


@pytest.fixture
def config(tmp_path) -> Path:
    raw = conf(tmp_path / "run", write_zarr(tmp_path / "s.zarr", dataset()), epochs=1)
    write_statistics(parse_config(raw))
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize(
    "model", ["{when: build}", "{when: build, leave: true}", "{when: call}", "{when: call, leave: true}"]
)
def test_a_model_of_the_users_that_raises(model, config, theirs, tmp_path, capsys) -> None:
    """In training and in a check; the line is theirs, whatever libraries lie between."""
    given = ["--set", f"model={{name: their_model.Raises, {model[1:]}"]
    kind = "SystemExit: 0" if "leave" in model else r"KeyError: 'two\\n\\nlines'"
    assert main(["train", str(config), *given]) == 1
    seen = capsys.readouterr().err
    assert re.search(rf"error: {re.escape(kind) if 'leave' in model else kind} \({theirs}:\d+, in end\)", seen), seen
    assert seen.count("credit: error") == 1
    assert "Traceback" not in seen
    assert len(files_in(tmp_path)) == 1
    assert main(["check", str(config), *given, "--json"]) == 1
    (finding,) = [one for one in json.loads(capsys.readouterr().out) if one["severity"] == "error"]
    assert finding["where"] == "model"
    assert f"{theirs}:" in finding["message"]
    assert finding["fix"].startswith("the traceback is in ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError: '(' was never closed (their_model.py, line 1)"),
        ("nothing.at.all", "NameError: name 'nothing' is not defined"),
    ],
)
def test_a_module_of_the_users_that_cannot_be_imported(text, said, config, theirs, capsys) -> None:
    theirs.write_text(text)
    importlib.invalidate_caches()
    assert main(["train", str(config), "--set", "model={name: their_model.Raises}"]) == 2
    seen = capsys.readouterr().err
    assert f"credit: error: model.name: their_model.Raises: importing their_model failed with {said}" in seen
    assert f"({theirs}:1" in seen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: 1\nb: \xff", "is not UTF-8 in line 2; save it as UTF-8"),
        (
            b"a: 1\nb:\n  c: 2\n  c: 3",
            "is not valid YAML in line 4, column 3: the key c stands there twice, first in line 3",
        ),
        (b"a: 2020-13-01", "is not valid YAML in line 1, column 4: 2020-13-01: month must be in 1..12"),
        (b"a: 1" + b"0" * 5000, "is not valid YAML in line 1"),
        (b"a: !!python/name:os.system x", "could not determine a constructor for the tag"),
        (b"[" * 100_000, "its blocks lie too deep in each other"),
        (b"a: *b", "found undefined alias 'b'"),
        (b"a: &a\n  b: [*a]", "is not valid YAML in line 2, column 7: *a is within itself"),
        (b"a: b\x00", "is not valid YAML: unacceptable character #x0000"),
        (b"? [a]\n: 1", "is not valid YAML in line 1, column 3: found unhashable key"),
        (b"a" * 1_000_001, "is 1000001 characters long"),
    ],
)
def test_files_that_are_no_yaml(text, said, tmp_path) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "c.yaml")
    assert said in caught.value.what + "; " + caught.value.fix
    assert caught.value.where == str(tmp_path / "c.yaml")


def test_what_cannot_be_read_at_all(tmp_path) -> None:
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "a\0b", "null byte"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_yaml(path)


def test_numbers_of_yaml_1_2() -> None:
    assert parse_yaml("[1e-3, 1E5, -.5e+2, 1_0, 1e, e1]", "x") == [1e-3, 1e5, -50.0, 10, "1e", "e1"]
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}", "x") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_assignments_that_are_no_yaml(config) -> None:
    for change, said in (
        ("run=[", "--set run=[: is not valid YAML in line 1"),
        ("run={a: 1, a: 2}", "stands there twice"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_config(config, [change])


SHAPES = (
    "[]",
    "1",
    "null",
    '"x"',
    "{}",
    '{"files": []}',
    '{"step": "x", "facts": {}, "files": {}}',
    "\xff",
    "{",
    "[" * 5000,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The config of a run that is done."""
    folder = tmp_path_factory.mktemp("trained")
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", dataset()), epochs=1)
    write_statistics(parse_config(raw))
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(folder / "c.yaml")]) == 0
    return folder / "c.yaml"


def test_manifests_of_other_shapes(trained) -> None:
    (checkpoint,) = list_checkpoints(trained.parent / "run" / "checkpoints")
    whole = (checkpoint / MANIFEST).read_bytes()
    for shape in (*SHAPES, '{"step": 1, "facts": {"a": 1}, "files": {"x": [1]}}'):
        (checkpoint / MANIFEST).write_text(shape, encoding="latin-1")
        with pytest.raises(CheckpointError, match=rf"{MANIFEST}: is damaged: .*; remove .*Remove .* to start again"):
            newest_good_checkpoint(checkpoint.parent)
    (checkpoint / MANIFEST).write_bytes(whole)
    assert newest_good_checkpoint(checkpoint.parent) is not None


def test_a_status_of_another_shape(tmp_path) -> None:
    for shape in (*SHAPES, '{"state": "odd", "step": 1, "steps": 2}', '{"state": [], "step": 1, "steps": 2}'):
        (tmp_path / FILE).write_text(shape, encoding="latin-1")
        with pytest.raises(DataError, match=rf"{FILE}: is damaged"):
            read_status(tmp_path)


def test_a_log_that_is_damaged(tmp_path) -> None:
    """What cannot be read at all is said; rows that are none are left out."""
    log = tmp_path / "log.csv"
    log.write_text('step\n"' + "x" * 200_000)
    with pytest.raises(DataError, match=r"log\.csv: is damaged: .*; move it away"):
        StepLog(tmp_path, 5, 10, active=True)
    for damage in (
        b"s\n1,\x00\n4",
        b"s\n\xff\xfe,2\n4",
        b"\n\n4",
        "s\n\u00b2\n4".encode(),
        b"s\n" + b"1" * 5000 + b"\n4",
    ):
        log.write_bytes(damage)
        StepLog(tmp_path, 5, 10, active=True).close()
        assert log.read_text().splitlines()[-1] == "4"


def credit(*words: str, **more) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    given = {"text": True, "timeout": 240, "stderr": subprocess.PIPE, "env": env, **more}
    return subprocess.run([sys.executable, "-m", "credit", *words], **given)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of a megabyte of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("needs root, and may then not mount")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with filler.open("wb") as stream:
        stream.write(b"x" * max(free.f_bavail * free.f_frsize - left, 0))


@pytest.mark.parametrize(
    "allocate", [lambda: bytearray(2**62), lambda: torch.empty(2**60, dtype=torch.uint8)], ids=["python", "torch"]
)
def test_memory_that_does_not_suffice_is_no_bug(allocate, monkeypatch, capsys) -> None:
    monkeypatch.setattr(boundary, "_speaks", lambda *_: True)
    assert bounded(allocate) == 2
    said = capsys.readouterr().err
    assert said.startswith("credit: error: the memory does not suffice: ")
    assert "; try --slices auto, trainer.accumulate or more domain ranks" in said


@pytest.mark.parametrize(("lines", "code"), [(1, "0"), (10**6, "120")])
def test_a_reader_that_leaves_is_no_error(tmp_path, lines: int, code: str) -> None:
    """As `| head` does, in the middle of more than a pipe holds."""
    script = tmp_path / "much.py"
    script.write_text(
        "from credit.__main__ import end_with\nfrom credit.boundary import bounded\n"
        f"end_with(bounded(lambda: print(*range({lines}), sep='\\n')))\n"
    )
    piped = f'"{sys.executable}" "{script}" | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"0\n{code}\n", "")


def test_printing_to_a_full_disk_is_said(trained, disk) -> None:
    fill(disk, 0)
    with (disk / "log").open("w") as full:
        done = credit("status", str(trained), stdout=full)
        assert done.returncode == 120
        assert done.stderr == "credit: error: what was printed is lost: [Errno 28] No space left on device\n"
        assert credit("status", str(trained), stdout=full, stderr=full).returncode == 120


STORE, COPY = "{folder}/s.zarr", "{disk}/copy.zarr"
WRITERS = {
    "train": ("train", "{config}", "--set", "run={disk}/run"),
    "statistics": ("data", "stats", "{config}", "--set", "data.stats={disk}/stats.nc"),
    "demo": ("data", "demo", "{disk}/demo.zarr", "--states", "20"),
    "copy": ("data", "rechunk", STORE, COPY),
    "coarser copy": ("data", "regrid", STORE, COPY, "--grid", "7x8"),
    "init": ("init", "quickstart", "--site", "derecho"),
    "export": ("export", "{config}", "{disk}/w.safetensors", "--set", "run={disk}/run"),
    "forecast": ("forecast", "{config}", "--set", "run={disk}/run"),
    "score": ("score", "{config}", "--set", "run={disk}/run"),
}


@pytest.mark.parametrize("left", [0, 8192, 65536])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_by_every_writer(writer, left, trained, disk, capsys, monkeypatch) -> None:
    """Whether it is full at once, or in the middle: in a paragraph, and nothing half-written keeps its name."""
    monkeypatch.chdir(disk)
    if writer in ("export", "forecast", "score"):
        shutil.copytree(trained.parent / "run", disk / "run")
    if writer == "score":
        assert main(["forecast", str(trained), "--set", f"run={disk}/run"]) == 0
    fill(disk, left)
    capsys.readouterr()
    words = [word.format(folder=trained.parent, disk=disk, config=trained) for word in WRITERS[writer]]
    code, seen = main(words), capsys.readouterr().err
    if code == 0 and left:  # it fitted
        return
    assert code in (1, 2), seen
    assert seen.count("credit: error: ") == 1, seen
    assert "Traceback" not in seen
    assert re.search("[Nn]o space|No such|room on the disk|disk|Errno 28|write|iostream|HDF", seen), seen


def test_places_are_theirs_before_ours_before_a_librarys(theirs) -> None:
    theirs.write_text("import json\ndef f(text):\n    return json.loads(text)\n")
    module = importlib.import_module("their_model")
    with pytest.raises(ValueError, match="Expecting") as caught:
        module.f("[")
    assert place_of(caught.value) == f"{theirs}:3, in f"
    with pytest.raises(ValueError, match="is not a duration") as caught:
        parse_step("x")
    frames = caught.value.__traceback__
    assert frames is not None
    assert place_of(caught.value.with_traceback(frames.tb_next)).startswith(f"{boundary.__file__[:-11]}steps.py:")
