"""Files to start from, in the working directory: a config, a site's job script, the sources of an image. No torch."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

from credit.config.reference import SCHEMA
from credit.errors import ConfigError, CreditError
from credit.launch.sites import job_script, load_site, script_name, site_names
from credit.shipped import CONFIGS, HPC, SHARE

IMAGE = Path("credit-image")
Files = dict[Path, Callable[[Path], object]]
"""What is to be written, and how each is."""


def listing() -> str:
    """What there is to start from."""
    heads = {name: (CONFIGS / f"{name}.yaml").read_text().partition("\n#\n")[0] for name in config_names()}
    configs = [(name, textwrap.shorten(head.replace("#", ""), 96, placeholder=" ...")) for name, head in heads.items()]
    sites = [(name, load_site(name).title) for name in site_names()]
    lines = ["configs, for `credit init NAME`:", *(f"  {name:20s} {what}" for name, what in configs)]
    lines += ["sites, for `credit init NAME --site SITE`:", *(f"  {name:20s} {what}" for name, what in sites)]
    return "\n".join(
        [*lines, f"`credit init --container` writes {IMAGE}/, from which an image of this credit is built."]
    )


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def init(name: str | None, site: str | None, container: bool, replace: bool) -> list[Path]:
    """Write a config, a site's script and site file, or the sources of an image, into the working directory.

    Args:
        site: a name, or a site file of the user's.
        replace: what is there already.

    Returns:
        What was written: files, or the folder of the image.

    Raises:
        ConfigError: if there is no such config or site, or a file is there already. Nothing is written then.
        CreditError: if it cannot be written.
    """
    files: Files = {}
    if name is not None:
        files |= _config(name)
    if site is not None:
        files |= _site(site)
    if container:
        files[IMAGE] = write_sources
    there = [str(path) for path in files if path.exists() or path.is_symlink()]
    if there and not replace:
        raise ConfigError(f"{', '.join(there)}: there already, and nothing was written. --force replaces what is there")
    for path, write in files.items():
        try:
            write(path)
        except OSError as error:
            raise CreditError(f"{path} cannot be written: {error}") from None
    return list(files)


def _config(name: str) -> Files:
    if name not in config_names():
        close = difflib.get_close_matches(name, config_names()) or [one for one in config_names() if name in one]
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"there is no config {name!r} to start from", fix=f"{meant}`credit init` lists what there is")
    text = (CONFIGS / f"{name}.yaml").read_text().replace("configs/", "")  # in the examples of its head
    head = f"# yaml-language-server: $schema={SCHEMA}\n"
    return {Path(f"{name}.yaml"): lambda path: path.write_text(head + text)}


def _site(name: str) -> Files:
    text = job_script(name)
    files: Files = {Path(script_name(name, load_site(name).scheduler)): lambda path: _write_program(path, text)}
    if name in site_names():
        files[Path(f"{name}.yaml")] = lambda path: shutil.copyfile(HPC / "sites" / f"{name}.yaml", path)
    return files


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_sources(folder: Path) -> None:
    """All that containers/build.sh needs: the package as it is installed here, and what builds it."""
    shutil.rmtree(folder, ignore_errors=True)
    hidden = shutil.ignore_patterns("__pycache__", SHARE.name)
    shutil.copytree(SHARE.parent, folder / "credit", ignore=hidden)
    shared = folder / "credit" / SHARE.name
    shared.mkdir()
    for one in SHARE.iterdir():
        copy = shutil.copytree if one.is_dir() else shutil.copy
        copy(one, folder / one.name)
        (shared / one.name).symlink_to(Path("../..", one.name))
