"""From another package's config to one of ours, with a finding for each key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from credit.config.foreign import FOREIGN, as_list, lookup, moment
from credit.config.loading import parse_config
from credit.errors import ConfigError
from credit.findings import Finding

LISTS = ("data.variables", "data.diagnostics", "data.forcings", "data.statics", "data.path")
"""Of which several of their keys each give a part."""


def migrate(theirs: Mapping[str, Any], ranks: int | None = None) -> tuple[dict[str, Any], list[Finding]]:
    """Our config, and what became of each of their keys.

    Args:
        theirs: a whole config, as its file has it.
        ranks: GPUs that it was run on; its job block tells by default.

    Returns:
        A config whose keys are all ours. Findings: ok, a key that only has another name; warning, one that counts
        otherwise here or not at all, with the reason; error, what remains to be written or mended.
    """
    ours: dict[str, Any] = {}
    findings = []
    joint = _joined({}, {}, None)
    for path, value in _leaves(theirs):
        where = ".".join(path)
        entry, same = lookup(path), _is_ours(where)
        if entry is None and not same:
            findings.append(Finding("warning", where, "not known, and left out"))
        elif entry is not None and not entry.ours:
            findings.append(Finding("warning", where, f"left out: {entry.why}"))
        else:
            to, turn = (where, lambda given: given) if entry is None else (entry.ours, entry.turn)
            try:
                if to not in joint:
                    _put(ours, to, turn(value))
                why = "" if entry is None else entry.why
                findings.append(
                    Finding("warning" if why else "ok", where, f"becomes {to}" + (f" ({why})" if why else ""))
                )
            except (ValueError, TypeError) as error:
                findings.append(Finding("error", where, f"left out: {error}", f"Write {to}"))
    ranks = ranks or _ranks_of(theirs)
    if ranks is None and _get(theirs, "trainer.train_batch_size") is not None:
        said = "taken as that of one GPU, as no job block says how many"
        findings.append(Finding("warning", "trainer.train_batch_size", said, "Give --ranks"))
    for key, joined in _joined(theirs, _get(ours, "trainer.parallelism") or {}, ranks).items():
        try:
            _put(ours, key, joined())
        except (ValueError, TypeError) as error:
            findings.append(Finding("error", key, f"cannot be taken over: {error}"))
    if ours.get("model", {}).get("name") is None:
        ours.pop("model", None)  # its keys are those of a kind that is not known
    try:
        parse_config(ours)
    except ConfigError as error:
        findings += [Finding("error", one.where, one.what, one.fix) for one in error.problems]
    return ours, findings


def _leaves(block: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values with their places; blocks of which the table knows the whole count as one."""
    for key, value in block.items():
        place = (*path, str(key))
        known = FOREIGN.get(".".join(place))
        within = any(other.startswith(".".join([*place, ""])) for other in FOREIGN)
        if isinstance(value, Mapping) and (known is None or within):
            yield from _leaves(value, place)
        else:
            yield place, value


def _is_ours(where: str) -> bool:
    """True if such a key, unknown to the table, means the same in both."""
    return where in ("trainer.epochs", "trainer.learning_rate", "trainer.weight_decay") or where.startswith(
        "trainer.parallelism."
    )


def _put(ours: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    block = ours
    for parent in parents:
        block = block.setdefault(parent, {})
    if key in LISTS:
        value = [*dict.fromkeys([*block.get(last, []), *value])]
    if (value is not None and value != []) or key == "trainer.clip":
        block[last] = value


def _get(theirs: Any, key: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in key.split("."):
        theirs = theirs.get(part) if isinstance(theirs, Mapping) else None
    return theirs


def _joined(theirs: Mapping[str, Any], layout: Mapping[str, Any], ranks: int | None) -> dict[str, Callable[[], Any]]:
    """What several of their keys say together, by our key: None where they say nothing.

    Args:
        layout: ours, `trainer.parallelism`.
    """

    def get(key: str) -> Any:
        return _get(theirs, key)

    def period(block: str, years: str) -> Any:
        bounds = [get(f"{block}.{end}_datetime") for end in ("start", "end")]
        if None not in bounds:
            return [*map(moment, bounds)]
        return None if get(years) is None else FOREIGN[years].turn(get(years))

    def grid() -> Any:
        sides = [get(f"model.image_{side}") for side in ("height", "width")]
        return None if None in sides else sides

    def padding() -> Any:
        pads = [pad for side in ("lat", "lon") if (pad := get(f"model.padding_conf.pad_{side}"))]
        on = get("model.padding_conf.activate") is not False
        return max(max(as_list(pad)) for pad in pads) if pads and on else None

    def schedule() -> Any:
        if get("trainer.use_scheduler") is False:
            return "constant"
        kind = get("trainer.scheduler.scheduler_type")
        return None if kind is None else FOREIGN["trainer.scheduler.scheduler_type"].turn(kind)

    def batch_size() -> Any:
        each = get("trainer.train_batch_size")
        replicas = (ranks or 1) // (layout.get("tensor", 1) * layout.get("domain", 1))
        return None if each is None else each * max(replicas, 1) * (get("trainer.grad_accum_every") or 1)

    return {
        "data.train": lambda: period("data", "data.train_years"),
        "data.valid": lambda: period("data_valid", "data.valid_years"),
        "data.test": lambda: _test_period(get("predict.forecasts") or {}),
        "data.grid": grid,
        "model.padding": padding,
        "trainer.ema": lambda: get("trainer.ema_decay") if get("trainer.use_ema") is not False else None,
        "trainer.schedule": schedule,
        "trainer.batch_size": batch_size,
    }


def _test_period(asked: Mapping[str, Any]) -> list[str] | None:
    """From the first start of their forecasts to the end of the last."""
    if not {"start_year", "days"} <= set(asked):
        return None
    start = datetime(asked["start_year"], asked.get("start_month", 1), asked.get("start_day", 1))
    return [moment(start), moment(start + timedelta(days=asked.get("duration", 1) + asked["days"]))]


def _ranks_of(theirs: Mapping[str, Any]) -> int | None:
    """That the job block asks for."""
    nodes, each = _get(theirs, "pbs.nodes"), _get(theirs, "pbs.ngpus")
    return nodes * each if isinstance(nodes, int) and isinstance(each, int) else None
