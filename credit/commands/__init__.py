"""The verbs of the command line: a module each, with `add`, which names it, and what runs it. Light to import."""

from credit.commands import (
    check,
    completion,
    data,
    doctor,
    export,
    forecast,
    init,
    layout,
    migrate,
    plan,
    report,
    score,
    site,
    status,
    submit,
    train,
    verify,
)

GROUPS = {
    "run": (train, forecast, score, report, status, export),
    "check": (check, verify, plan, layout, doctor),
    "data": (data,),
    "site": (init, migrate, submit, site, completion),
}
"""In the order of `credit --help`; a module's last name is the verb's."""
