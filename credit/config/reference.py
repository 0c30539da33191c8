"""Every key of a config: a JSON schema for editors, and from it docs/config.md. `python -m credit.config.reference`.

Both are written from the classes of this package; a test holds the files to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from credit.config.whole import Config

SCHEMA = Path(__file__).with_name("schema.json")
PAGE = Path(__file__).parents[2] / "docs" / "config.md"
"""In a checkout."""
FAR = 1e5
"""A bound as large as this guards against slips, and is not worth a word."""
HEAD = """# Every key of a config

<!-- Written by `make reference` from the classes in credit/config: change those. -->

A key without a default must be given. **run** marks what makes a run what it is: with another value none may resume or
forecast from its checkpoints. Unknown keys are refused with the nearest known one; `--set trainer.epochs=5` replaces a
value for a run.

Editors that know YAML schemas complete keys and mark mistakes: the first line of what `credit init` writes names the
schema of the installed version, `credit/config/schema.json`.
"""


def schema() -> dict[str, Any]:
    """A JSON schema of a config file."""
    return Config.model_json_schema()


def page() -> str:
    """Markdown: a table for each block, those inside others after them, and one for each model."""
    whole = schema()
    blocks = [("The file", whole), *_inside(whole, "", whole["$defs"])]
    return "\n".join([HEAD, *(_section(title, block) for title, block in blocks)])


def _inside(block: dict[str, Any], prefix: str, names: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in block["properties"].items():
        for name in dict.fromkeys(_references(value)):
            inner = names[name]
            kind = inner["properties"].get("name", {}).get("const") if key == "model" else None
            title = f"`{prefix}{key}`" + (f": {kind or 'a class of your own'}" if key == "model" else "")
            yield title, inner
            yield from _inside(inner, f"{prefix}{key}.", names)


def _references(value: Any) -> Iterator[str]:
    """Names of the definitions that a value may be of."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rsplit("/")[-1]
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def _section(title: str, block: dict[str, Any]) -> str:
    lines = [f"## {title}", ""]
    if "description" in block:
        lines += [block["description"], ""]
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in block["properties"].items():
        shown = f"`{_yaml(value['default'])}`" if "default" in value and "$ref" not in value else ""
        words = " ".join(value.get("description", "").split()).replace("|", "\\|")
        marked = f"**run** {words}" if value.get("x-of-the-run") else words
        lines.append(f"| `{key}` | {_kind(value)} | {shown} | {marked} |")
    return "\n".join([*lines, ""])


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _kind(value: dict[str, Any]) -> str:
    """In words, of a value's schema."""
    if "$ref" in value:
        return "a block"
    if "const" in value:
        return f"`{_yaml(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    several = value.get("anyOf") or value.get("oneOf")
    if several:
        return " or ".join(dict.fromkeys(map(_kind, several)))
    if value.get("type") == "array":
        parts = value.get("prefixItems")
        return f"[{', '.join(map(_kind, parts))}]" if parts else f"list of: {_kind(value['items'])}"
    if value.get("type") == "object":
        return (
            f"names: {_kind(value['additionalProperties'])}"
            if isinstance(value.get("additionalProperties"), dict)
            else "names"
        )
    if value.get("type") == "string":
        return value.get("title", "Text") if value.get("title", "Text")[0].islower() else "text"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "none"}
    return ", ".join([words[value["type"]], *_bounds(value)])


def _bounds(value: dict[str, Any]) -> Iterator[str]:
    """Those that are not there against slips alone."""
    if abs(value.get("minimum", FAR)) < FAR:
        yield f"{value['minimum']:g} or more"
    if "exclusiveMinimum" in value:
        yield f"above {value['exclusiveMinimum']:g}"
    if value.get("maximum", FAR) < FAR:
        yield f"up to {value['maximum']:g}"
    if value.get("exclusiveMaximum", FAR) < FAR:
        yield f"below {value['exclusiveMaximum']:g}"
    if "multipleOf" in value:
        yield f"a multiple of {value['multipleOf']}"


def write() -> None:
    """Both files, in a checkout."""
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    write()
