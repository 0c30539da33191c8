"""A plain model's weights in one file: written from any mesh, read by anything that reads safetensors, or torch."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from credit.errors import CheckpointError, ConfigError
from credit.files import rename_synced
from credit.parallel.collectives import together
from credit.parallel.pieces import in_pieces, whole

FACTS = "credit"
"""Of the metadata of a file, the entry that holds what its weights are of."""
WEIGHTS = "model.safetensors"
"""Of a directory that holds a model."""
INSIDE = ("model_state_dict", "state_dict", "model")
"""Keys under which training programs keep a model's state beside other things."""
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "model.")
"""What wrappers put before names: DistributedDataParallel, torch.compile, checkpointing, and modules around a model."""


def export_plain(model: nn.Module, path: Path, prefix: str = "", facts: dict[str, Any] | None = None) -> None:
    """Write the plain model's state dict into one file: safetensors, or what torch.load reads. Called by all ranks.

    Args:
        model: on any mesh.
        path: *.safetensors, or *.pt.
        prefix: of all names, to be left out.
        facts: small and JSON, kept in safetensors; `read_facts` gives them back.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"{path}: name the file *.safetensors, or *.pt to be read by torch.load")
    pieces = in_pieces(model, get_model_state_dict(model))
    first = not dist.is_initialized() or dist.get_rank() == 0
    # One tensor at a time is made whole, so that no rank but the first holds them all. Tied weights are written twice.
    plain = {
        name.removeprefix(prefix): full.detach().cpu().clone().contiguous()
        for name, value in pieces.items()
        if (full := whole(value)) is not None and first
    }
    with together(f"writing {path}"):
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            if path.suffix == ".pt":
                with partial.open("wb") as file:
                    torch.save(plain, file)
            else:
                save_file(plain, partial, metadata={"format": "pt", FACTS: json.dumps(facts or {})})
            rename_synced(partial, path)


def weights_file(path: Path) -> Path:
    """The file, or that of a directory that holds a model."""
    return path / WEIGHTS if path.is_dir() else path


def read_facts(path: Path) -> dict[str, Any]:
    """What `export_plain` was told about the weights; nothing of another's file."""
    path = weights_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            if not isinstance(facts, dict):
                raise ValueError(f"{FACTS} of its head is {facts!r}")
            return facts
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from None


def load_plain(model: nn.Module, path: Path, only: Sequence[str] = ("*",), skip: Sequence[str] = ()) -> str:
    """Read a plain state dict into a plain model, on any number of ranks, before it is laid out on a mesh.

    A state that lies inside a training program's checkpoint, and names with the prefixes of wrappers, are understood.

    Args:
        path: safetensors, or what torch.save wrote; nothing in it is executed. Or a directory with a model.
        only, skip: patterns of the names to take, and of those among them to leave as they are.

    Returns:
        What was read, in words.

    Raises:
        CheckpointError: naming the file, and what is missing, unknown or of another shape.
    """
    ours = model.state_dict()
    wanted = [name for name in ours if _matches(name, only) and not _matches(name, skip)]
    if not wanted:
        raise CheckpointError(f"no parameter is named like {', '.join(only)} and not like {', '.join(skip) or 'none'}")
    path = weights_file(path)
    state, words = _unwrapped(_read(path), ours)
    state = {name: value for name, value in state.items() if _matches(name, only) and not _matches(name, skip)}
    problems = [f"it has no {name}" for name in wanted if name not in state]
    problems += [f"the model has no {name}" for name in state if name not in ours]
    problems += [
        f"{name} has the shape {tuple(state[name].shape)}, not {tuple(ours[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != ours[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{path} does not hold this model's weights: {'; '.join(problems[:6])}{more}. To take some of them, give "
            f"trainer.init_from as path, only and skip"
        )
    model.load_state_dict(state, strict=False)
    left = [name for name in ours if name not in wanted]
    as_drawn = f"; as drawn: {', '.join(left[:6])}{' and more' if len(left) > 6 else ''}" if left else ""
    return f"{len(wanted)} of {len(ours)} tensors from {path}{words}{as_drawn}"


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters with names like these out of training.

    Raises:
        ConfigError: if a pattern fits no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not found:
            there = f"there are {', '.join(parameters)[:300]}"
            raise ConfigError(f"no parameter is named like {pattern!r}", "trainer.freeze", there)
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("leaves no parameter to train", "trainer.freeze")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror or error}") from None
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be read as weights: {reason}") from None


def _unwrapped(state: Any, ours: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict in what a file holds, under the plain model's names; and what was done for that."""
    said = []
    while isinstance(state, dict) and (key := next((key for key in INSIDE if isinstance(state.get(key), dict)), None)):
        state = state[key]
        said.append(f"from its {key!r}")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"the file holds {type(state).__name__}, and no state dict in {', '.join(INSIDE)}")
    while state and not ours.keys() & state.keys():
        prefix = next((one for one in WRAPPERS if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        said.append(f"without {prefix!r}")
    within = [one for one in ("_orig_mod.", "_checkpoint_wrapped_module.") if any(one in name for name in state)]
    for prefix in within:  # around blocks
        state = {name.replace(prefix, ""): value for name, value in state.items()}
        said.append(f"without {prefix!r}")
    return state, f" ({', '.join(said)})" if said else ""
