"""What a config names by a dotted path: a user's own model, loss, schedule, constraint."""

from __future__ import annotations

import importlib
from typing import Any

from credit.boundary import CAUGHT, summary
from credit.errors import ConfigError


def load_dotted(path: str, where: str) -> Any:
    """The object at a path such as `my_package.models.MyModel`.

    Args:
        where: the key of the config, for errors.

    Raises:
        ConfigError: if its module cannot be imported, or has no such name.
    """
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except CAUGHT as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"{path}: importing {module_path} failed with {summary(error)}. Is it installed, or its directory on "
            f"PYTHONPATH?",
            where,
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{module_path} has no {name}", where)
    return getattr(module, name)


def call_dotted(path: str, where: str, *args: Any, **kwargs: Any) -> Any:
    """Call what is at `path`.

    Raises:
        ConfigError: if it cannot be loaded, or does not take these arguments.
    """
    found = load_dotted(path, where)
    try:
        return found(*args, **kwargs)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        given = ", ".join(
            [*(type(one).__name__ for one in args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        )
        raise ConfigError(f"{path}({given}): {summary(error)}", where) from error
