"""Errors for users: one paragraph that says what, where, and how to mend it. The CLI prints them bare."""

from __future__ import annotations


class CreditError(Exception):
    """Something the user can mend: a config, a file, a layout."""

    exit_code = 2


class ConfigError(CreditError):
    """The config asks for something that does not exist or does not fit.

    Attributes:
        problems: the message, one problem at a time, each "dotted.path: what" where it has a path.
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or [message]

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.problems)


class DataError(CreditError):
    """A store is missing, damaged, or not what the config says it is."""


class LaunchError(CreditError):
    """The ranks were started in a way that cannot give a right result."""


class CheckpointError(CreditError):
    """A checkpoint cannot be read, or belongs to another run."""


class Stopped(CreditError):
    """A signal announced the end of the job; all ranks have saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
