"""Checkpoints: written in the background, damaged, left unfinished; runs that are wrong from the start or get so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from credit.errors import CreditError
from credit.launch.job import Job
from credit.parallel import checkpoint
from credit.parallel.checkpoint import list_checkpoints
from credit.training import setup
from tests.ranks import RankError
from tests.training.runs import curve, exported, interrupted, on, small, with_transformer


@pytest.fixture
def raw(tmp_path) -> dict:
    return shortened(small(tmp_path))


def shortened(raw: dict) -> dict:
    """Five steps with checkpoints at 2, 4 and 5."""
    raw["trainer"].update(epochs=1, checkpoint_every=2)
    return raw


@pytest.fixture
def transformer(raw) -> dict:
    raw = with_transformer(raw)
    raw["trainer"].update(epochs=1, checkpoint_every=1)
    return raw


@pytest.fixture(scope="module")
def runs(worlds, tmp_path_factory) -> tuple[dict, Path, list[float]]:
    """Two runs beside each other, for tests to copy: one whole, one that died after its second checkpoint.

    What they are of, the directory with both, and the losses of the whole one.
    """
    folder = tmp_path_factory.mktemp("runs")
    raw = shortened(small(folder))
    losses, *_ = curve(on(raw, folder / "whole", "none", 1))
    assert len(losses) == 5
    worlds(2).run(interrupted, on(raw, folder / "cut", "none", 2), 4)
    return raw, folder, losses


@pytest.fixture
def cut(runs, tmp_path) -> dict:
    """A copy of the run that died, to be resumed."""
    raw, folder, _ = runs
    shutil.copytree(folder / "cut", tmp_path / "cut")
    return on(raw, tmp_path / "cut", "none", 2)


def test_writing_in_the_background_gives_the_same_checkpoints(worlds, transformer, tmp_path) -> None:
    curves = []
    for name, in_background in (("at once", False), ("later", True)):
        transformer["trainer"]["checkpoint_async"] = in_background
        curves.append(worlds(4).run(curve, on(transformer, tmp_path / name, "ddp", 1, 2))[0][0])
    assert curves[0] == curves[1]
    transformer["trainer"]["checkpoint_async"] = False
    states = []
    for name in ("at once", "later"):
        exported(on(transformer, tmp_path / name, "none", 1), tmp_path / "weights.safetensors")
        states.append(load_file(tmp_path / "weights.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_failure_in_the_background_ends_all_ranks(worlds, transformer, tmp_path) -> None:
    transformer["trainer"].update(checkpoint_async=True)
    with pytest.raises(RankError, match=r"writing the checkpoint .* failed .*on rank 1: OSError: no room") as caught:
        worlds(2).run(full_disk, on(transformer, tmp_path / "run", "none", 2))
    assert len(caught.value.errors) == 2


def full_disk(raw: dict) -> None:
    real = checkpoint.dcp.save

    def save(*args, **kwargs) -> None:
        if dist.get_rank() == 1:
            raise OSError("no room")

    checkpoint.dcp.save = save
    try:
        curve(raw)
    finally:
        checkpoint.dcp.save = real


@pytest.mark.parametrize("damage", ["cut short", "changed", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(worlds, runs, cut, damage) -> None:
    *_, whole_losses = runs
    newest = list_checkpoints(Path(cut["run"]) / "checkpoints")[-1]
    file = next(newest.glob("*.distcp"))
    content = file.read_bytes()
    changed = {"cut short": content[: len(content) // 2], "changed": content[:-1] + bytes([content[-1] ^ 1])}
    file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
    rest, said = worlds(2).run(losses_and_words, cut)[0]
    assert f"{newest} is damaged: {file.name} " in said
    assert f"going back to the one before\nresuming from {newest.with_name('step-00000002')}" in said
    assert rest == pytest.approx(whole_losses[2:], rel=1e-9)
    assert [path.name for path in list_checkpoints(newest.parent)] == ["step-00000004", "step-00000005"]


def test_what_a_manifest_does_not_list_is_not_read(runs, tmp_path) -> None:
    """Torch executes what it finds in some files."""
    raw, folder, _ = runs
    shutil.copytree(folder / "whole", tmp_path / "whole")
    newest = list_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert ".metadata" in manifest["files"]
    del manifest["files"][".metadata"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    _, said = losses_and_words(on(raw, tmp_path / "whole", "none", 1))
    assert f"{newest} is damaged: its manifest does not list .metadata; going back to the one before" in said


def losses_and_words(raw: dict) -> tuple[list[float], str]:
    """The losses, and what the run says."""
    said: list[str] = []
    real, Job.say = Job.say, lambda self, text: said.append(text)
    try:
        return curve(raw)[0], "\n".join(said)
    finally:
        Job.say = real


def test_only_damaged_checkpoints_are_an_error_on_every_rank(worlds, cut) -> None:
    for file in (Path(cut["run"]) / "checkpoints").glob("*/*.distcp"):
        file.write_bytes(b"")
    message = r"no checkpoint is whole: .*step-00000004 is damaged: .*step-00000002 is damaged: .* to start again"
    with pytest.raises(RankError, match=message) as caught:
        worlds(2).run(curve, cut)
    assert len(caught.value.errors) == 2


def test_the_last_two_checkpoints_are_kept_and_partial_ones_ignored(runs, tmp_path) -> None:
    raw, folder, _ = runs
    shutil.copytree(folder / "whole", tmp_path / "whole")
    directory = tmp_path / "whole" / "checkpoints"
    (directory / "step-00000099").mkdir()
    assert [path.name for path in list_checkpoints(directory)] == ["step-00000004", "step-00000005"]
    losses, *_ = curve(on(raw, tmp_path / "whole", "none", 1))
    assert losses == []


def test_a_gradient_that_is_not_finite_ends_the_run_and_reaches_no_weight(raw) -> None:
    raw["trainer"].update(learning_rate=1e6, clip=None, dtype="float32")
    with pytest.raises(
        CreditError, match=r"the norm of the gradient is (nan|inf) at step \d+, of .*change the weights"
    ):
        curve(raw)


def test_every_rank_starts_from_the_same_weights_or_none_does(worlds, raw, tmp_path) -> None:
    with pytest.raises(Exception, match=r"initial weights on ranks \[1\] differ from rank 0's"):
        worlds(2).run(unseeded, on(raw, tmp_path / "run", "none", 2))


def unseeded(raw: dict) -> None:
    real = setup.build_model

    def build(*args):
        model = real(*args)
        with torch.no_grad():
            model.stem.conv.weight += dist.get_rank()
        return model

    setup.build_model = build
    try:
        curve(raw)
    finally:
        setup.build_model = real
