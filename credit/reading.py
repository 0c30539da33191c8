"""Files that users and earlier runs have written, read whole: YAML and JSON, or an error that says what is wrong where.

YAML is that of PyYAML's safe loader, with three differences: a key that stands twice in a block is refused, where the
last would count; so is a block within itself; and 1e-3 is a number, as in YAML 1.2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from credit.errors import ConfigError, CreditError

T = TypeVar("T")
LONGEST = 1_000_000
"""Characters of a file that people write."""


class _Loader(yaml.SafeLoader):
    """Every mistake in a text is a YAMLError, with its line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[str] = []  # anchors of the blocks that are being read

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError, LookupError) as error:  # a 13th month, an int of 5000 digits
            value = str(node.value)[:40] if isinstance(node, yaml.ScalarNode) else "this"
            raise yaml.constructor.ConstructorError(None, None, f"{value}: {error}", node.start_mark) from None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """None within itself: what walks through it would not end."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._open:
            raise yaml.constructor.ConstructorError(None, None, f"*{event.anchor} is within itself", event.start_mark)
        is_block = isinstance(event, yaml.CollectionStartEvent) and event.anchor is not None
        if is_block:
            self._open.append(event.anchor)
        composed = super().compose_node(parent, index)
        if is_block:
            self._open.remove(event.anchor)
        return composed

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """As they stand in the text: what is merged into a block may stand there too."""
        composed = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in composed.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands there twice, first in line {first}", key.start_mark
                )
            lines[key.tag, key.value] = key.start_mark.line + 1
        return composed


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: at `where`, with the line.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"is {len(text)} characters long, and no text of a config or a site is", where)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"is not valid YAML{line}: {error.problem or error.context}", where) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {' '.join(str(error).split())}", where) from None
    except RecursionError:
        raise ConfigError("is not valid YAML: its blocks lie too deep in each other", where) from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: naming the file, if it cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"is not UTF-8 in line {line}", str(path), "save it as UTF-8") from None
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"cannot be read: {error}", repr(str(path))) from None
    return parse_yaml(text, str(path))


def read_json(path: Path, shape: type[T], kind: type[CreditError], fix: str) -> T:
    """What an earlier run has written.

    Args:
        shape: a dataclass; keys that it does not have are passed over.
        kind, fix: of the error.

    Raises:
        FileNotFoundError: if it is not there.
        CreditError: of `kind`, if it cannot be read, is damaged, or is of another shape.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except ValidationError as error:
        said = "; ".join(".".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors()[:3])
        raise kind(f"is damaged: {said}", str(path), fix) from None
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", str(path), fix) from None
