"""Errors for users: one paragraph that says where, what, and how to fix it. The CLI prints them bare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CreditError(Exception):
    """Something the user can fix: a config, a file, a layout.

    Attributes:
        what: the words, which need neither of the others where they say all.
        where: dotted path of the config, or a file; empty where `what` names it.
        fix: the way out; empty where `what` says it.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        placed = f"{self.where}: {self.what}" if self.where else self.what
        return f"{placed}; {self.fix}" if self.fix else placed


class ConfigError(CreditError):
    """The config asks for something that does not exist or does not fit.

    Attributes:
        problems: one error each, where there are several.
    """

    def __init__(self, what: str, where: str = "", fix: str = "", problems: Sequence[CreditError] = ()) -> None:
        super().__init__(what, where, fix)
        self.problems = [*problems] or [self]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, [one for one in self.problems if one is not self])


class DataError(CreditError):
    """A store is missing, damaged, or not what the config says it is."""


class LaunchError(CreditError):
    """The ranks were started in a way that cannot give a right result."""


class HeardByFewError(LaunchError):
    """Rank 0 may not be there to say it. `speaks` is true on the rank that does."""

    def __init__(self, what: str, where: str = "", fix: str = "", speaks: bool = True) -> None:
        super().__init__(what, where, fix)
        self.speaks = speaks


class CheckpointError(CreditError):
    """A checkpoint cannot be read, or belongs to another run."""


class UnforeseenError(CreditError):
    """What nobody foresaw, from code of the user's or of ours: its type and place; `fix` names the traceback's file."""

    exit_code = 1


class Stopped(CreditError):
    """A signal announced the end of the job; all ranks have saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
