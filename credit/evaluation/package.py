"""A trained model as a directory: all that a forecast needs of its run, and nothing else.

model.safetensors      the plain model's weights, averaged ones if there are
config.json            what they are of: class, arguments, channels, grid, normalisation, and the run's whole config
fields.safetensors     statics as the model is given them, and where values are always missing
forcings.nc            means by month and hour of stored forcings, if there are any
certificate.json       digests of these, and how far the model over ranks is from the plain one: `credit verify`
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import credit
from credit.config import Config, parse_config
from credit.config.models import class_path
from credit.data.climatology import ForcingClimatology
from credit.data.dataset import Fields
from credit.data.grid import Grid
from credit.data.store import Channel
from credit.errors import CheckpointError
from credit.files import rename_synced, write_atomically
from credit.parallel.weights import WEIGHTS

CONFIG, FIELDS, FORCINGS, CERTIFICATE = "config.json", "fields.safetensors", "forcings.nc", "certificate.json"
FILES = (WEIGHTS, CONFIG, FIELDS, FORCINGS, CERTIFICATE)


class Described:
    """What `config.json` and the files of fields beside it say.

    Attributes:
        config: of the run.
        channels: that are predicted, in the order of the model's outputs; the first `state` of them are the state.
        normalisation: by channel, mean and std, and of the state increment_std, in their own units.
        units: by variable, of those that have one.
        statics: normalised, float32, (static, latitude, longitude).
        mask: true where values are not missing, (predicted channel, latitude, longitude); None if none are.
        forcings: in place of stored ones.
    """

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError: if a file is missing or damaged."""
        try:
            said = json.loads((directory / CONFIG).read_text())
            self.config: Config = parse_config(said["config"], str(directory / CONFIG))
            grid = {name: np.array(said["grid"][name], said["grid"]["dtype"]) for name in ("latitude", "longitude")}
            self.grid = Grid(**grid, region=said["grid"]["region"])
            self.channels = [Channel(one["variable"], one["level"]) for one in said["channels"]["predicted"]]
            self.state = int(said["channels"]["state"])
            self.normalisation: dict[str, dict[str, float]] = said["normalisation"]
            self.units: dict[str, str] = said["units"]
            fields = load_file(directory / FIELDS)
            self.statics, self.mask = fields["statics"], fields.get("mask")
            self.forcings = _read_forcings(directory / FORCINGS)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory} does not hold a model of `credit export`: {error!r}") from None


def write_package(directory: Path, fields: Fields, units: dict[str, str]) -> None:
    """All but the weights and the certificate.

    Args:
        fields: of the whole globe.
    """
    grid, config = fields.store.grid, fields.config
    mean, std = (moment.flatten().tolist() for moment in fields.moments())
    change = (fields.moments()[1] * fields.channel_unit.double()).flatten().tolist()
    names = [channel.name for channel in fields.predicted]
    numbers: dict[str, dict[str, float]] = {name: {"mean": mean[i], "std": std[i]} for i, name in enumerate(names)}
    for name, step in zip(names[: fields.state_channels], change, strict=False):
        numbers[name]["increment_std"] = step
    numbers |= {name: {"mean": mean, "std": std} for name, (mean, std) in fields.given_moments.items()}
    said = {
        "format": 1,
        "credit": credit.__version__,
        "class": class_path(config.model),
        "call": [fields.input_channels, len(names), list(grid.shape)],
        "arguments": config.model.model_dump(mode="json", exclude={"name"}),
        "channels": {
            "predicted": [{"variable": one.variable, "level": one.level} for one in fields.predicted],
            "state": fields.state_channels,
            "given": [*config.data.forcings, *config.data.statics],
        },
        "grid": {
            "latitude": grid.latitude.tolist(),
            "longitude": grid.longitude.tolist(),
            "dtype": str(grid.latitude.dtype),
            "region": grid.region,
        },
        "normalisation": numbers,
        "units": units,
        "config": config.to_dict(),
    }
    write_atomically(directory / CONFIG, json.dumps(said, indent=1) + "\n")
    tensors = {"statics": fields.statics.contiguous()}
    if fields.mask is not None:
        tensors["mask"] = torch.from_numpy(fields.mask)
    partial = directory / f".{FIELDS}.partial"
    save_file(tensors, partial)
    rename_synced(partial, directory / FIELDS)


def write_forcings(directory: Path, forcings: ForcingClimatology) -> None:
    """If there are any."""
    if forcings.means.size:
        partial = directory / f".{FORCINGS}.partial"
        forcings.means.to_dataset(name="means").to_netcdf(partial, engine="netcdf4")
        rename_synced(partial, directory / FORCINGS)


def _read_forcings(path: Path) -> ForcingClimatology | None:
    if not path.exists():
        return None
    with xr.open_dataset(path, engine="netcdf4") as dataset:
        return ForcingClimatology(dataset["means"].load())


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def written(certificate: dict[str, Any]) -> str:
    """A certificate as its file has it: with the digest of all the rest, so that it has one form alone."""
    rest = {key: value for key, value in certificate.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "digest": digest}, indent=1, sort_keys=True) + "\n"


def read_certificate(directory: Path) -> dict[str, Any]:
    """What `written` wrote.

    Raises:
        CheckpointError: if it is missing, or a byte of it is another.
    """
    path = directory / CERTIFICATE
    try:
        text = path.read_bytes().decode()
        certificate = json.loads(text)
        if not isinstance(certificate, dict) or written(certificate) != text:
            raise ValueError("a byte of it was changed")
        return certificate
    except (FileNotFoundError, NotADirectoryError):
        said = f"{directory} is no directory with a certificate"
        raise CheckpointError(said, fix="`credit export CONFIG DIR` writes one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no certificate: {error}", fix="export the model again") from None


def changed_files(directory: Path, certificate: dict[str, Any]) -> list[str]:
    """What is not as it was certified, in words: files that were changed, are missing, or were added."""
    wanted: dict[str, str] = certificate["files"]
    there = {name for name in FILES if (directory / name).exists()} - {CERTIFICATE}
    return [
        *(f"{name} is missing" for name in wanted if name not in there),
        *(f"{name} was added" for name in sorted(there - {*wanted})),
        *(f"{name} was changed" for name in sorted(there & {*wanted}) if digest_of(directory / name) != wanted[name]),
    ]


def refuse_changed(directory: Path) -> None:
    """Raise a CheckpointError if a file of the directory is not the one that was certified."""
    if (directory / CERTIFICATE).exists():
        changed = changed_files(directory, read_certificate(directory))
        if changed:
            raise CheckpointError(f"{directory}: {'; '.join(changed)} since it was certified")
