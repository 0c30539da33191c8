"""Words in shell scripts. All that comes from outside of a script goes through `quote`, or is refused. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from credit.errors import ConfigError


def quote(word: object) -> str:
    """One word for a POSIX shell that reads it as it is, whatever its characters.

    Raises:
        ConfigError: for a NUL, which no argument of a program can hold.
    """
    text = str(word)
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a NUL character, which no program can be given: leave it out")
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and "," in text else quoted  # as shellcheck wants it in arrays


def directive(value: object, what: str) -> str:
    """A word on an #SBATCH or #PBS line, which the scheduler reads by rules of its own.

    Args:
        what: whose value it is, for the message.

    Raises:
        ConfigError: if it has characters that the schedulers read differently, or that would end the line.
    """
    text = str(value)
    if not re.fullmatch(r"[\w@%+=:,./|&()\[\]~^*-]+", text):
        raise ConfigError(
            f"{what} is {text!r}, which no #SBATCH or #PBS line can carry: use letters, digits and punctuation without "
            f"blanks, quotes, backslashes or line breaks"
        )
    return text


def words(line: str, **values: str) -> list[str]:
    """The words of a site's command, with each {name} replaced by its value."""
    return [_replaced(word, values, str) for word in shlex.split(line)]


def command(line: str, **expressions: str) -> str:
    """A site's command for a script: its words quoted, and each {name} replaced by an expression of the shell."""
    return " ".join(_replaced(word, expressions, quote) for word in shlex.split(line))


def _replaced(word: str, values: dict[str, str], rest: Callable[[str], str]) -> str:
    known = {f"{{{name}}}": value for name, value in values.items()}
    parts = [part for part in re.split(r"(\{\w+\})", word) if part] or [""]
    return "".join(known[part] if part in known else rest(part) for part in parts)
