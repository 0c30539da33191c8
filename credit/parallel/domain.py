"""Domain parallelism as part of the mesh: converting a model, and moving fields between the globe and its shards.

The true grid is what is cut, and padding is added at the poles alone: a rank's rows are the same latitudes in the
input, the output and the target, however the model pads inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from credit.domain_parallel.convert import Converter, convert_to_domain_parallel
from credit.domain_parallel.lengths import global_length
from credit.domain_parallel.manager import DomainParallelError, DomainParallelManager, of_several
from credit.domain_parallel.partition import Partition
from credit.domain_parallel.root import Border
from credit.domain_parallel.sharding import gather_tensor, shard_tensor
from credit.domain_parallel.slab import Slab, inside_model
from credit.domain_parallel.torch_private import tree_map_only
from credit.parallel.collectives import sync_domain_gradients

__all__ = [
    "apply_domain_parallel",
    "gather_spatial",
    "get_domain_manager",
    "get_raw_model",
    "shard_lat_weights",
    "shard_spatial",
    "sync_domain_gradients",
    "unpad_shard_interp",
]

PADS = ("pad_lat", "pad_lon")


def apply_domain_parallel(
    model: nn.Module, domain_mesh: DeviceMesh | None, custom_converters: Mapping[Any, Converter] | None = None
) -> nn.Module:
    """Make `model` compute on latitude slabs over the ranks of `domain_mesh` (1-D, or a mesh with that dimension)."""
    return convert_to_domain_parallel(
        model, DomainParallelManager.from_mesh(domain_mesh), custom_converters=custom_converters
    )


def get_raw_model(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel and torch.compile. Its names are the plain model's."""
    while True:
        inner = model._modules.get("module") if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = inner or model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def get_domain_manager(model: nn.Module) -> DomainParallelManager | None:
    """The manager that a converted model works for; None for a plain one."""
    border = getattr(get_raw_model(model), "_domain_border", None)
    return border.manager if isinstance(border, Border) else None


def shard_spatial(tensor: Any, manager: DomainParallelManager | None) -> Any:
    """This rank's rows of whole fields (..., latitude, longitude): a tensor, or tensors in dicts, lists and tuples.

    The rows are those of the true grid, `Partition(latitudes, ranks)`; all of them without a manager.
    """
    manager = of_several(manager)
    if manager is None:
        return tensor
    return tree_map_only(Tensor, lambda x: shard_tensor(x, -2, manager), tensor)


def gather_spatial(tensor: Any, manager: DomainParallelManager | None) -> Any:
    """Whole fields, on every domain rank, from the ranks' rows: the inverse of `shard_spatial`. Differentiable.

    Args:
        tensor: (..., rows, longitude), or such tensors in dicts, lists and tuples.
    """
    manager = of_several(manager)
    if manager is None:
        return tensor
    return tree_map_only(Tensor, lambda x: gather_tensor(x, -2, manager), tensor)


def shard_lat_weights(weights: Tensor, manager: DomainParallelManager | None) -> Tensor:
    """This rank's rows of weights by latitude: (latitude,), or (..., latitude, 1) and (..., latitude, longitude).

    The mean of rows so weighted is this rank's share of the global one if it is divided by the number of all rows, not
    by this rank's: shards differ by a row.

    Raises:
        TypeError: if it is no tensor.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"shard_lat_weights takes a tensor of weights by latitude, not a {type(weights).__name__}")
    manager = of_several(manager)
    return weights if manager is None else shard_tensor(weights, -min(weights.ndim, 2), manager)


def unpad_shard_interp(
    y_pred: Tensor, padding_opt: Any, manager: DomainParallelManager | None, image_h: int, image_w: int
) -> Tensor:
    """This rank's rows of the prediction on the true grid, from its rows on the padded one.

    The padding is taken off the whole field and the rows are dealt out anew, so that a rank ends up with the very
    latitudes it has of the target. A field whose size still differs is interpolated as a whole, bilinearly.

    Args:
        y_pred: (..., rows, longitude), a rank's share of (image_h + padding) rows; of fewer or more where the model
            changes the resolution.
        padding_opt: what padded the field: an object with `unpad(field)`; a mapping, or an object, with "pad_lat" and
            "pad_lon", each the number of rows or columns on both sides or a pair (before, after); or None.
        manager: None for a whole field.
        image_h, image_w: the true grid.

    Returns:
        (..., this rank's share of image_h, image_w).
    """
    manager = of_several(manager)
    if manager is None:
        return _fitted(_unpadded(y_pred, padding_opt), image_h, image_w)
    length = global_length(y_pred.shape[-2], manager.group, "unpad_shard_interp")
    field: Tensor = Slab(y_pred, y_pred.ndim - 2, Partition(length, manager.domain_world_size), manager.group)
    with inside_model():
        field = _fitted(_unpadded(field, padding_opt), image_h, image_w)
    return Border(manager, -2).leave(field)


def _unpadded(field: Tensor, padding_opt: Any) -> Tensor:
    if padding_opt is None:
        return field
    if hasattr(padding_opt, "unpad"):
        return padding_opt.unpad(field)
    if not isinstance(padding_opt, Mapping):
        padding_opt = {name: getattr(padding_opt, name) for name in PADS if hasattr(padding_opt, name)} or None
        if padding_opt is None:
            raise DomainParallelError(f"padding_opt has neither unpad(field) nor {' or '.join(PADS)}: give it one")
    (top, bottom), (left, right) = (_pair(padding_opt.get(name, 0)) for name in PADS)
    return field[..., top : field.shape[-2] - bottom, left : field.shape[-1] - right]


def _pair(pad: Any) -> tuple[int, int]:
    return (pad, pad) if isinstance(pad, int) else (pad[0], pad[1])


def _fitted(field: Tensor, image_h: int, image_w: int) -> Tensor:
    if tuple(field.shape[-2:]) == (image_h, image_w):
        return field
    lead = field.shape[:-2]
    flat = field.reshape(1, -1, *field.shape[-2:])
    return F.interpolate(flat, (image_h, image_w), mode="bilinear").reshape(*lead, image_h, image_w)
