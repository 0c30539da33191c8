"""From a file and `--set` to a config, and what is said of a key that cannot be so."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from credit.config.foreign import FOREIGN, hint
from credit.config.models import MODELS, TAGS
from credit.config.whole import Config
from credit.errors import ConfigError
from credit.reading import parse_yaml, read_yaml


class ForeignKeyError(ConfigError):
    """A key of another package, of which `credit.config.foreign` knows what it is here."""


Keys = Callable[[tuple[int | str, ...]], list[str]]


def load_config(path: str | Path, replace: Sequence[str] = ()) -> Config:
    """Read and check a YAML config.

    Args:
        replace: assignments such as "trainer.epochs=2", made after reading; values are YAML.

    Raises:
        ConfigError: naming the file, and each key that is unknown, missing or of a wrong type.
    """
    raw = read_yaml(Path(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"must hold the keys {', '.join(Config.model_fields)}", str(path))
    for assignment in replace:
        _assign(raw, assignment)
    return parse_config(raw, str(path))


def _assign(raw: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    *parents, last = key.split(".")
    if not equals or not last:
        raise ConfigError(f"cannot set {assignment!r}: write it as trainer.epochs=2")
    block = raw
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            raise ConfigError(f"cannot set {key}: {parent} is a value, not a block")
    block[last] = parse_yaml(value, f"--set {key}={value}")


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Check a config given as a dictionary; see `load_config`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = problems_in(error)
        foreign = sum(isinstance(one, ForeignKeyError) for one in found) > 1
        fix = f"`credit migrate {origin}` turns a config of NCAR's CREDIT into one of ours" if foreign else ""
        raise ConfigError("; ".join(map(str, found)), origin, fix, found) from None


@contextmanager
def said_of(*place: str) -> Iterator[None]:
    """Turn what pydantic says of the block at a place of the config into words of ours.

    Raises:
        ValueError: in place of a ValidationError.
    """
    try:
        yield
    except ValidationError as error:
        raise ValueError("; ".join(map(str, problems_in(error, place)))) from None


def problems_in(error: ValidationError, place: Sequence[str] = (), keys: Keys | None = None) -> list[ConfigError]:
    """What pydantic says, in words of ours, one a key, with the nearest known key for an unknown one.

    Args:
        place: of what was validated in the whole config.
        keys: those that may stand at a place; those of the config by default.
    """
    return [_explain({**one, "loc": (*place, *one["loc"])}, keys or _keys_at) for one in error.errors()]


def _explain(error: Any, keys: Keys) -> ConfigError:
    where = ".".join(str(key) for key in error["loc"] if key not in TAGS) or "config"
    if error["type"] == "extra_forbidden":
        foreign = hint([key for key in error["loc"] if key not in TAGS])
        if foreign is not None:
            return ForeignKeyError("unknown key", where, str(foreign))
        known = keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        nearest = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return ConfigError("unknown key", where, nearest)
    if error["type"].startswith("union_tag"):
        given = error["input"]
        got = _SHORT.repr(given.get("name") if isinstance(given, dict) else given)
        names = f"must be one of {', '.join(MODELS)}, or the dotted path of a class"
        if isinstance(given, dict) and "type" in given and "name" not in given:
            return ForeignKeyError("unknown key", f"{where}.type", f"{FOREIGN['model.type']}; it {names}")
        return ConfigError(f"{names}, got {got}", f"{where}.name")
    if error["type"] == "missing":
        return ConfigError("missing", where)
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", got {_SHORT.repr(error['input'])}"
    return ConfigError(f"{message[0].lower()}{message[1:]}{got}", where)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the block at a location."""
    block: Any = Config
    for key in location:
        if key in TAGS:
            block = TAGS[str(key)]
            continue
        if isinstance(key, int):  # of a list, whose blocks are all alike
            continue
        fields = {name: field.annotation for name, field in block.model_fields.items()}
        kinds = (fields[str(key)], *get_args(fields[str(key)]))
        block = next((kind for kind in kinds if hasattr(kind, "model_fields")), block)
    return [*block.model_fields]
