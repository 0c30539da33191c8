"""The verbs of the command line: a module each, with `add`, which names it, and what runs it. Light to import."""

from credit.commands import (
    check,
    data,
    doctor,
    export,
    forecast,
    init,
    layout,
    migrate,
    plan,
    score,
    site,
    status,
    submit,
    train,
)

VERBS = (train, forecast, score, check, plan, export, status, layout, submit, init, migrate, site, doctor, data)
"""In the order of `credit --help`."""
