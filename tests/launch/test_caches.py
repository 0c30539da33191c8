"""Caches at names that anybody can foresee are ours alone, or others are used."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from credit.caches import compiled_code, own_caches


@pytest.fixture
def public(tmp_path, monkeypatch) -> Path:
    """A directory where everybody may write, as /tmp."""
    (tmp_path / "public").mkdir()
    (tmp_path / "public").chmod(0o1777)
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    return tmp_path / "public"


def test_a_cache_is_made_for_its_user_alone(public, capsys) -> None:
    env = {"XDG_CACHE_HOME": f"{public}/credit-7", "MPLCONFIGDIR": f"{public}/credit-7/matplotlib"}
    before = dict(env)
    own_caches(env)
    assert env == before
    assert (public / "credit-7").stat().st_mode & 0o777 == 0o700
    (public / "credit-7").chmod(0o755)
    own_caches(env)
    assert (public / "credit-7").stat().st_mode & 0o777 == 0o700
    assert not capsys.readouterr().err


@pytest.mark.parametrize("how", ["another user's", "a link", "a file"])
def test_what_another_user_has_put_there_is_not_used(public, capsys, how) -> None:
    place = public / "credit-7"
    if how == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        place.mkdir()
        os.chown(place, 12345, 12345)
    elif how == "a link":
        place.symlink_to(public.parent)
    else:
        place.touch()
    env = {"XDG_CACHE_HOME": str(place), "TRITON_CACHE_DIR": f"{place}/triton", "MPLCONFIGDIR": "/nowhere/of/mine"}
    own_caches(env)
    other = Path(env["XDG_CACHE_HOME"])
    assert other.parent == public.parent / "t"
    assert env["TRITON_CACHE_DIR"] == f"{other}/triton"
    assert env["MPLCONFIGDIR"] == "/nowhere/of/mine"
    assert capsys.readouterr().err.count(f"{place} is not ours: caches are in {other}") == 1


def test_compiled_code_is_kept_where_it_is_looked_after(public, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    env: dict[str, str] = {}
    compiled_code(env)
    own_caches(env)
    assert (public / f"credit-{os.geteuid()}").stat().st_mode & 0o777 == 0o700
    given = {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
    compiled_code(given)
    assert given == {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
