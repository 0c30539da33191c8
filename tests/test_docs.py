"""The pages: they build with every link checked, their commands are taken, and the messages they explain are said."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from credit.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "containers/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_site_builds_with_all_links(tmp_path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert pages.keys() >= {"index.html", "config.html", "glossary.html", "versions.html", "troubleshooting.html"}
    assert "torch</td>" in pages["versions.html"]
    assert "positions along the cut axis" in pages["glossary.html"]
    loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"', pages["index.html"])
    assert not loaded


def commands(page: Path) -> list[str]:
    """The lines of code blocks that start `credit`, without what launches it and what is said of it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    found = [re.fullmatch(r"(?:(?:torchrun|srun|mpiexec)\b.* -m )?credit (?!:)(\w.*)", line) for line in lines]
    return [one[1] for one in found if one]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page: Path) -> None:
    for line in commands(page):
        words = re.sub(r"['\[\]]", "", line).split()
        words = ["check", "config", *words[1:]] if words[0] == "check" and words[1] != "parity" else words
        parser().parse_args(words)


def test_there_are_commands_to_try() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 25


def test_messages_that_are_explained_are_said() -> None:
    said = "\n".join(
        node.value
        for path in (ROOT / "credit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ).lower()
    explained = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(explained) > 12
    assert [one for one in explained if one.lower() not in said] == []
