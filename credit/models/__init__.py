"""Models: plain PyTorch modules. None of them knows of ranks; how their own layers are cut is said here."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from credit.config.models import MODELS, Custom, Model, class_path
from credit.domain_parallel import DomainParallelPeriodicConv2d, SharedHalo
from credit.dotted import load_dotted
from credit.errors import ConfigError
from credit.models.sphere import PeriodicConv2d, reflect_at_all_sides
from credit.models.wxformer import CrossEmbedLayer

DOMAIN_CONVERTERS = {PeriodicConv2d: DomainParallelPeriodicConv2d, CrossEmbedLayer: SharedHalo}
"""For `convert_to_domain_parallel`: the layers of these models that are more than torch's own."""


def build_model(
    conf: Model, in_channels: int, out_channels: int, grid: tuple[int, int], region: bool = False
) -> nn.Module:
    """The model that the config names, with torch's random numbers as they stand.

    Args:
        grid: (latitudes, longitudes) of the whole field.
        region: the field is not wrapped around. A user's own model is taken to know.

    Raises:
        ConfigError: if a dotted path does not lead to an nn.Module, or that does not take the config's arguments; if a
            model of the package is not for regions.
        ValueError: if the model does not fit the grid.
    """
    kind = load_model_class(class_path(conf))
    arguments = conf.model_dump(exclude={"name"})
    if isinstance(conf, Custom):
        _check_arguments(conf.name, kind, arguments)
    elif region and not conf.of_regions:
        raise ConfigError(
            f"model.name: {conf.name} joins the east to the west, and data.grid is region: take one of "
            f"{', '.join(name for name, block in MODELS.items() if block.of_regions)}, or a model of your own"
        )
    coarsest = min(grid) >> arguments.get("levels", 0)
    if region and not isinstance(conf, Custom) and coarsest < 2:
        raise ValueError(
            f"{grid[0]} x {grid[1]} points cannot be halved {arguments['levels']} times and reflected at "
            f"the sides of a region: choose fewer model.levels"
        )
    model = kind(in_channels, out_channels, grid, **arguments)
    return reflect_at_all_sides(model) if region else model


def load_model_class(path: str) -> type[nn.Module]:
    """The class at a dotted path, such as `my_package.models.MyModel`.

    Raises:
        ConfigError: if its module cannot be imported, has no such name, or it is no subclass of nn.Module.
    """
    found = load_dotted(path, "model.name")
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ConfigError(f"model.name: {path} is no subclass of torch.nn.Module")
    return found


def _check_arguments(path: str, kind: type[nn.Module], arguments: dict[str, Any]) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind("in_channels", "out_channels", "grid", **arguments)
    except TypeError as error:
        raise ConfigError(
            f"model: {path}{signature} cannot be called as {path.rpartition('.')[2]}(in_channels, out_channels, grid"
            f"{''.join(f', {key}=...' for key in arguments)}): {error}"
        ) from None
