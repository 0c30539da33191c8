"""Odd values everywhere: every key of every config that is shipped, every option of every verb, `--set`, and the files.

Nonsense, of which nothing may be accepted: a number that is not finite, is negative where something is counted or is
weighed, or is beyond the bound that `credit.bounds` states; a flag for a number, a number for a flag, a number in
quotes; an empty name, or one of several lines; a date that the calendar does not have, or a number for a date; a key
that is unknown or stands twice; and text that is not YAML. And whatever is refused is refused in words of ours: no
traceback, and no error that nobody foresaw.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from credit import cli
from credit.bounds import LARGEST, LARGEST_VALUE, MOST_STEPS, file, positive
from credit.checks.preflight import preflight
from credit.cli import main
from credit.config import Config, load_config, parse_config
from credit.data.prepare import write_statistics
from credit.errors import ConfigError, CreditError, UnforeseenError
from credit.launch.job import start_job
from credit.reading import parse_yaml
from credit.training.train import TrainingRun
from tests.stores import conf, dataset, write_zarr

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
QUICKSTART = next(path for path in CONFIGS if path.stem == "quickstart")
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "1.5", "1e30", "-1.0e+30", ".inf", "-.inf", ".nan", "1000000001"),
    *(
        "1" + "0" * 30,
        "''",
        "x",
        '"1"',
        '"a\\0b"',
        "[]",
        "[1]",
        "[x]",
        "no_such.thing",
        "[.inf, true]",
        "[[]]",
        "{}",
        "{a: 1}",
    ),
    *("99999-01-01", "2020-13-45", "1-1-1", "!!python/name:os.system x", "*nowhere", "{a: 1, a: 1}"),
)
"""As they stand in a file."""
SIGNED = ("trainer.seed", "data.levels", "data.missing")
"""Keys whose numbers may be less than 0, or more than a bound that counts have."""
Case = tuple[Path, tuple[str, ...], str]
SAMPLE, SEED = 250, 1


def keys_of(block: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in block.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*above, key))


def all_cases() -> list[Case]:
    """Every key that stands in a shipped config, and every key there is in one of them."""
    places = [(path, key) for path in CONFIGS for key in keys_of(yaml.safe_load(path.read_text()))]
    places += [(QUICKSTART, key) for key in keys_of(load_config(QUICKSTART).to_dict())]
    return [(path, key, text) for path, key in dict.fromkeys(places) for text in VALUES]


def with_value(path: Path, key: tuple[str, ...], text: str) -> str:
    """The text of a config with one value replaced, as somebody might write it."""
    block = raw = load_config(path).to_dict() if path == QUICKSTART else yaml.safe_load(path.read_text())
    for part in key[:-1]:
        block = block[part]
    block[key[-1]] = "HERE"
    return yaml.safe_dump(raw).replace("HERE", text)


def at(config: Config, key: tuple[str, ...]) -> Any:
    found: Any = config.model_dump()
    for part in key:
        found = found.get(part)
    return found


def leaves(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{above}.{key}" if above else str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one, above)
    else:
        yield above, value


def nonsense(config: Config, key: tuple[str, ...], text: str) -> str:
    """What of it has been accepted."""
    given, taken = yaml.safe_load(text), at(config, key)
    for one, other in zip(dict(leaves(given, "x")).values(), dict(leaves(taken, "x")).values(), strict=False):
        if isinstance(one, bool) != isinstance(other, bool):
            return f"{one!r} became {other!r}"
        if isinstance(one, str) and isinstance(other, int | float):
            return f"{one!r} became {other!r}"
        if isinstance(one, int | float) and isinstance(other, datetime):
            return f"{one!r} became {other!r}"
    for where, one in leaves(config.model_dump()):
        if isinstance(one, str) and (not one.isprintable() or not one):
            return f"{where} is {one!r}"
        if isinstance(one, int | float) and not isinstance(one, bool):
            most = {"missing": LARGEST_VALUE, "seed": 2**63}.get(where.split(".")[1], MOST_STEPS)
            most = 2**63 if where == "trainer.seed" else LARGEST if isinstance(one, float) and most < 1e30 else most
            if not abs(one) <= most:
                return f"{where} is {one}"
            if one < 0 and not where.startswith(SIGNED):
                return f"{where} is {one}"
    return ""


def problem_of(case: Case, file: Path) -> str:
    path, key, text = case
    file.write_text(with_value(path, key, text))
    try:
        config = load_config(file)
    except ConfigError as error:
        return "" if str(file) in str(error) else f"{error} does not name the file"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return nonsense(config, key, text)


def problems_of(cases: list[Case], file: Path) -> dict[str, str]:
    found = {f"{path.stem} {'.'.join(key)}: {text}": problem_of((path, key, text), file) for path, key, text in cases}
    return {case: problem for case, problem in found.items() if problem}


def test_a_sample_of_odd_values_of_keys(tmp_path) -> None:
    assert problems_of(random.Random(SEED).sample(all_cases(), SAMPLE), tmp_path / "c.yaml") == {}


@pytest.mark.slow
def test_odd_values_of_every_key(tmp_path) -> None:
    cases = all_cases()
    assert len(cases) > 4000
    assert problems_of(cases, tmp_path / "c.yaml") == {}


def taken_as(path: Path, changes: Sequence[str] = ()) -> Config | str:
    try:
        return load_config(path, changes)
    except ConfigError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def differences(cases: list[Case], file: Path) -> list[str]:
    """Values that `--set` takes otherwise than a file."""
    found = []
    for path, key, text in cases:
        file.write_text(with_value(path, key, text))
        change = f"{'.'.join(key)}={text}"
        if taken_as(file) != taken_as(path, [change]):
            found.append(f"{path.stem} {change}: {taken_as(file)!s:.60} / {taken_as(path, [change])!s:.60}")
    return found


def test_a_sample_of_odd_values_is_taken_by_set_as_in_a_file(tmp_path) -> None:
    assert differences(random.Random(SEED + 1).sample(all_cases(), SAMPLE), tmp_path / "c.yaml") == []


@pytest.mark.slow
def test_odd_values_are_taken_by_set_as_in_a_file(tmp_path) -> None:
    assert differences([case for case in all_cases() if case[0] == QUICKSTART], tmp_path / "c.yaml") == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, list[tuple[tuple[str, ...], str]]]:
    """A config with its data, and what of all odd values it takes."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = conf(folder / "run", write_zarr(folder / "s.zarr", dataset()), epochs=1)
    raw["data"]["stats"] = str(folder / "stats.nc")
    config = parse_config(raw)
    write_statistics(config)
    path, taken = folder / "c.yaml", []
    for key in keys_of(config.to_dict()):
        if key in (("run",), ("trainer", "compile")):  # which writes elsewhere; which takes a minute
            continue
        for text in VALUES:
            with suppress(ConfigError):
                parse_config(with_odd(config, key, parse_yaml(text, "value")))
                taken.append((key, text))
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path, taken


def with_odd(config: Config, key: tuple[str, ...], value: Any) -> dict[str, Any]:
    block = raw = config.to_dict()
    for part in key[:-1]:
        block = block[part]
    block[key[-1]] = value
    return raw


def disagreement(path: Path, key: tuple[str, ...], text: str) -> str:
    """How training refuses what a check passes, or stumbles over it."""
    file = path.with_name("odd.yaml")
    file.write_text(yaml.safe_dump(with_odd(load_config(path), key, "HERE")).replace("HERE", text))
    found = preflight(str(file), [], 1)
    wrong = [str(one) for one in found if one.severity == "error"]
    if any("raceback" in one for one in wrong):
        return f"check: {wrong}"
    try:
        with start_job(lambda: load_config(file)) as job:
            TrainingRun(job)
    except UnforeseenError as error:
        return f"train: {error}"
    except CreditError as error:
        return "" if wrong else f"a check passes it, and training says: {error}"
    return ""


def disagreements(path: Path, cases: list[tuple[tuple[str, ...], str]]) -> dict[str, str]:
    found = {f"{'.'.join(key)}: {text}": disagreement(path, key, text) for key, text in cases}
    return {case: problem for case, problem in found.items() if problem}


def test_a_sample_of_what_a_check_passes_is_accepted_by_training(tiny) -> None:
    path, taken = tiny
    assert disagreements(path, random.Random(SEED).sample(taken, 12)) == {}


@pytest.mark.slow
def test_what_a_check_passes_is_accepted_by_training(tiny) -> None:
    path, taken = tiny
    assert len(taken) > 80
    assert disagreements(path, taken) == {}


ODD_NUMBERS = (
    "",
    "x",
    "-1",
    "1.5",
    "1e30",
    "nan",
    "inf",
    "true",
    "1" + "0" * 30,
    "1 2",
    "0x10",
    "\u0663",
    "\u00b2",
    "1_0",
    "1000000001",
)
"""For options that count: none of them is taken. 0 is, by some."""
ODD_WORDS = ("", "x", "-1", "nan", "a\0b", "a\nb", "/", "/dev/null", "é" * 300, "99999-01-01", "1e30", "[", "a=b", "*")


def verbs(parser: argparse.ArgumentParser, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with its parser."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for name, one in action.choices.items():
            yield from verbs(one, (*above, name))
    if not inner:
        yield above, parser


def commands() -> Iterator[tuple[list[str], bool]]:
    """Every option and argument of every verb with every odd value; and whether it is a number that must be refused."""
    needed = {"config": str(QUICKSTART), "path": "made", "source": "s.zarr", "paths": "s.zarr", "site": "derecho"}
    needed |= {"--site": "derecho", "--grid": "7x8", "theirs": "foreign.yml", "shell": "bash"}
    for verb, parser in verbs(cli.parser()):
        takes = [action for action in parser._actions if action.nargs != 0]
        for action in takes:
            others = [one for one in takes if one is not action and one.required]
            words = [w for one in others for w in (*one.option_strings[:1], needed[(*one.option_strings, one.dest)[0]])]
            safe = {"submit": ["--dry-run"], "train": ["--dry-run"], "demo": ["--states", "2"]}.get(verb[-1], [])
            number = action.type not in (None, file) and action.dest != "set"  # which the config refuses
            for value in ODD_NUMBERS if number else ODD_WORDS:
                if (action.type is positive and value == "1.5") or (action.dest == "seed" and value == "1000000001"):
                    continue  # which these take: a seed counts nothing
                mine = [f"{action.option_strings[0]}={value}"] if action.option_strings else ["--", value]
                yield [*verb, *safe, *words, *mine], number


def problem_of_command(words: list[str], is_number: bool, capsys: Any) -> str:
    by_the_parser = False
    try:
        code: Any = main(words)
    except SystemExit as end:
        code, by_the_parser = end.code, True
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    said = capsys.readouterr()
    if "raceback" in said.err + said.out:
        return said.err[-300:]
    if is_number and not by_the_parser:
        return f"taken, and ends with {code}"
    return "" if code in (0, 1, 2) else f"ends with {code}"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory in which nothing is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def problems_of_commands(cases: list[tuple[list[str], bool]], capsys: Any) -> dict[str, str]:
    found = {repr(words): problem_of_command(words, number, capsys) for words, number in cases}
    return {words: problem for words, problem in found.items() if problem}


def test_a_sample_of_odd_options(elsewhere, capsys) -> None:
    numbers = [case for case in commands() if case[1]]
    assert problems_of_commands(random.Random(SEED).sample(numbers, 60), capsys) == {}


@pytest.mark.slow
def test_odd_values_of_every_option(elsewhere, capsys) -> None:
    assert problems_of_commands([*commands()], capsys) == {}
