"""What `credit export DIR` certifies of a model, and `credit verify DIR` finds again: its files, and its parity."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import credit
from credit.checks.parity import parity_on_threads
from credit.domain_parallel import DomainParallelError
from credit.errors import CreditError
from credit.evaluation.package import CERTIFICATE, CONFIG, FILES, changed_files, digest_of, read_certificate, written
from credit.evaluation.trained import Trained
from credit.files import write_atomically
from credit.findings import Finding

MESHES = ((1, 2), (1, 3))
"""Ranks of (tensor, domain) that are tried by default."""
PACKAGES = ("torch", "numpy", "safetensors")


def certify(directory: Path, facts: dict[str, str], meshes: Sequence[tuple[int, int]], trust: bool) -> dict[str, Any]:
    """Write the certificate of a directory.

    Args:
        facts: digests of what the files are made from, by name.

    Raises:
        CreditError: if the model is not exact on one of the meshes; there is no certificate then.
    """
    trained = Trained(directory, trust)
    parity = [_parity(trained, mesh) for mesh in meshes]
    for one in parity:
        if not one["exact"]:
            raise CreditError(f"not exact with tensor {one['tensor']}, domain {one['domain']}: off by {_worst(one)}")
    certificate = {
        "format": 1,
        "files": {name: digest_of(directory / name) for name in FILES[:-1] if (directory / name).exists()},
        "digests": {**facts, "code": code_digest()},
        "versions": versions(),
        "parity": parity,
    }
    write_atomically(directory / CERTIFICATE, written(certificate))
    return certificate


def verify(directory: Path, files_only: bool = False, trust: bool = False) -> Iterator[Finding]:
    """Yield what was found of each file, the code, and the parity on each mesh of the certificate, which is repeated.

    A certificate says what was, not who says so: it is as good as where it comes from.
    """
    try:
        certificate = read_certificate(directory)
    except CreditError as error:
        yield Finding.of(error, CERTIFICATE)
        return
    changed = changed_files(directory, certificate)
    for said in changed:
        yield Finding("error", said.partition(" ")[0], f"{said} since it was certified")
    if changed:
        return
    yield Finding("ok", "files", f"{', '.join(certificate['files'])} are as certified")
    if certificate["digests"]["code"] == code_digest():
        yield Finding("ok", "code", f"credit {credit.__version__}, the code of the certificate")
    else:
        yield Finding("warning", "code", f"certified with other code, credit {certificate['versions']['credit']}")
    for name, here in versions().items():
        if certificate["versions"].get(name) != here:
            yield Finding("warning", name, f"certified with {certificate['versions'].get(name)}, and here is {here}")
    if files_only:
        return
    try:
        trained = Trained(directory, trust)
    except CreditError as error:
        yield Finding.of(error, CONFIG)
        return
    for wanted in certificate["parity"]:
        yield _repeated(trained, wanted)


def _repeated(trained: Trained, wanted: dict[str, Any]) -> Finding:
    where = f"tensor {wanted['tensor']}, domain {wanted['domain']}"
    try:
        found = _parity(trained, (wanted["tensor"], wanted["domain"]))
    except (CreditError, DomainParallelError) as error:
        return Finding("error", where, str(error))
    if found["errors"].keys() != wanted["errors"].keys():
        return Finding("error", where, "other tensors are compared than were certified")
    said = f"{len(found['errors'])} tensors, off by {_worst(found)}; certified {_worst(wanted)}"
    return Finding("ok" if found["exact"] else "error", where, said)


def _parity(trained: Trained, mesh: tuple[int, int]) -> dict[str, Any]:
    """The plain model with its weights, on one sample of random fields, in float64; ranks are threads."""
    said, (tensor, domain) = trained.described, mesh
    channels, _ = said.config.model_channels(said.state, len(said.channels) - said.state)
    generator = torch.Generator().manual_seed(said.config.trainer.seed)
    fields = torch.randn(1, channels, *said.grid.shape, dtype=torch.float64, generator=generator)
    report = parity_on_threads(said.config, trained.model, fields, mesh)
    errors = {name: error if math.isfinite(error) else str(error) for name, error in report.errors.items()}
    return {"tensor": tensor, "domain": domain, "dtype": "float64", "exact": report.exact, "errors": errors}


def _worst(parity: dict[str, Any]) -> str:
    name, error = max(parity["errors"].items(), key=lambda one: float(one[1]))
    return f"{float(error):.1e} at most ({name})"


def code_digest() -> str:
    """SHA-256 of all modules of this package, with their names."""
    root, digest = Path(credit.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {digest_of(path)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "credit": credit.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
