"""What a person at a terminal sees, and what scripts and logs read instead."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from credit.cli import main, parser
from credit.commands import GROUPS
from credit.commands.parser import Parser


def of(above: Parser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Parser]]:
    """Every verb with its parser, those that only hold others too."""
    for name, one in above.verbs.items():
        yield " ".join((*words, name)), one
        yield from of(one, (*words, name))


ALL = dict(of(parser()))


def at_a_terminal(*words: str, env: dict[str, str] | None = None) -> str:
    """What `credit` writes to a terminal of 160 columns."""
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", **(env or {})}
    with subprocess.Popen([sys.executable, "-m", "credit", *words], stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(mine, 65536)
            except OSError:  # the last writer has gone
                break
    os.close(mine)
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("verb", ALL)
def test_every_verb_is_explained_with_examples_that_it_takes(verb: str) -> None:
    one = ALL[verb]
    assert one.verbs or all(action.help for action in one._actions)
    examples = [line for line in one.format_help().partition("examples:\n")[2].splitlines() if line.startswith("  ")]
    assert any(f"credit {verb}".removesuffix(" config") in line for line in examples)
    for line in examples:
        words = re.sub(r"^.*?credit (?=\w)|   .*$| > .*$", "", line.strip()).split()
        words = ["check", "config", *words[1:]] if words[0] == "check" and words[1] != "parity" else words
        parser().parse_args(words)


def test_help_has_all_verbs_in_groups() -> None:
    text = parser().format_help()
    places = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    assert {verb.split()[-1] for verb in ALL} <= set(re.findall(r"^ +(\w+) ", text, re.M))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x"], "there is no verb 'trian'; did you mean `credit train`?"),
        (["describe", "x"], "there is no verb 'describe'; did you mean `credit data describe`"),
        (["data", "stat", "x"], "there is no verb 'stat'; did you mean `credit data stats`?"),
        (["qqq"], "there is no verb 'qqq'; verbs: train, forecast"),
        (["train", "x", "--dryrun"], "--dryrun: not understood; did you mean `--dry-run`?"),
        (["train", "x", "a.b=3"], "a.b=3: not understood; a key of the config is replaced by --set a.b=3"),
        (
            ["plan", "x", "--gpus", "x"],
            "argument --gpus: 'x' is no whole number from 1 to 1000000; `credit plan",
        ),
        (["train"], "the following arguments are required: config; `credit train --help` shows how"),
    ],
)
def test_what_is_not_understood_names_the_nearest(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    seen = capsys.readouterr().err
    assert seen.startswith(f"credit: error: {said}")
    assert seen.count("\n") == 1


def test_a_site_has_a_nearest_one(capsys) -> None:
    assert main(["submit", "configs/quickstart.yaml", "--site", "derehco"]) == 2
    assert "did you mean 'derecho'?" in capsys.readouterr().err


def test_at_a_terminal_error_and_hint_are_apart() -> None:
    words = ("status", "configs/quickstart.yaml", "--set", "trainer.epoch=3", "--set", "bla=2")
    plain = at_a_terminal(*words, env={"NO_COLOR": "1"})
    assert re.sub(r"\x1b\[[0-9;]*m", "", plain).splitlines() == [
        "error: configs/quickstart.yaml: 2 problems",
        "error: trainer.epoch: unknown key",
        " hint: did you mean 'epochs'?",
        "error: bla: unknown key",
        " hint: known keys: run, data, model, constraints, trainer, forecast",
    ]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    assert "\x1b[1;31merror: " in at_a_terminal(*words)


def test_findings_are_a_table_at_a_terminal_and_lines_elsewhere(capsys) -> None:
    assert main(["site", "check", "lumi"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("ok       lumi: slurm, ")
    seen = at_a_terminal("site", "check", "lumi")
    assert "\x1b[32mok" in seen
    assert "where" in seen
    assert json.loads(at_a_terminal("site", "check", "lumi", "--json"))[0]["severity"] == "ok"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--dry-run" in script
    assert "rechunk" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True) if shell == "bash" else None
    assert done is None or done.returncode == 0


def test_the_version_names_torch_and_devices(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.match(r"credit \S+, Python .*torch \d.*\n(no GPU|\d+ x )", capsys.readouterr().out)
