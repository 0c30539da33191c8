"""Errors for users: one paragraph that says what, where, and how to mend it. The CLI prints them bare."""

from __future__ import annotations


class CreditError(Exception):
    """Something the user can mend: a config, a file, a layout."""


class ConfigError(CreditError):
    """The config asks for something that does not exist or does not fit."""


class DataError(CreditError):
    """A store is missing, damaged, or not what the config says it is."""


class LaunchError(CreditError):
    """The ranks were started in a way that cannot give a right result."""


class CheckpointError(CreditError):
    """A checkpoint cannot be read, or belongs to another run."""
