"""What `make docs` does beside MkDocs: pages from files of the checkout, and links that lead out of the pages.

A fact stands in one file: README.md is the first page, the words are those of CONTRIBUTING.md, the versions those of
constraints.txt. A link to a file that is no page becomes its text, after a look whether the file is there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changes.md": "CHANGELOG.md",
    "containers.md": "containers/README.md",
}
"""Pages that are files of the checkout."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    made = {page: (ROOT / source).read_text() for page, source in PAGES.items()}
    made |= {"glossary.md": glossary(), "versions.md": versions()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = PurePosixPath(PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def linked(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path, hash_, anchor = target.partition("#")
        file = PurePosixPath(os.path.normpath(source.parent / path))
        ours = {name: own for own, name in PAGES.items()}.get(str(file))
        if ours is None and file.parts[0] == "docs":
            ours = str(file.relative_to("docs"))
        if ours is not None:
            return f"{mark}[{words}]({ours}{hash_}{anchor})"
        if not (ROOT / file).exists() and not (Path(page.config.docs_dir) / file.name).exists():
            raise PluginError(f"{source}: there is no {file}")
        return words if words != target else f"`{file}`"

    return LINK.sub(linked, markdown)


def glossary() -> str:
    """The words of CONTRIBUTING.md."""
    return "# Words\n" + (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Words\n")[2]


def versions() -> str:
    """What the tests run with, of constraints.txt; and the paragraph of README.md that says where."""
    needed = (ROOT / "constraints.txt").read_text().partition("# What these need")[0]
    rows = [f"| {name} | {version} |" for name, version in re.findall(r"^([\w.-]+)==(\S+)$", needed, re.M)]
    where = re.search(r"^\*\*Tested on\*\*.*?(?=\n\n)", (ROOT / "README.md").read_text(), re.M | re.S)
    head = "# Tested versions\n\nThese are tested together, in an environment and in the images alike.\n"
    return "\n".join([head, "| package | version |", "|---|---|", *rows, "", where[0] if where else ""])
