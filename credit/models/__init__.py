"""Models: plain PyTorch modules that know nothing of ranks."""

from __future__ import annotations

import importlib
import inspect

from torch import nn

from credit.config import Custom, Model
from credit.domain_parallel import DomainParallelPeriodicConv2d, SharedHalo
from credit.errors import ConfigError
from credit.models.pangu import Pangu
from credit.models.sphere import PeriodicConv2d
from credit.models.transformer import WindowTransformer
from credit.models.unet import UNet
from credit.models.unet_diffusion import DiffusionUNet
from credit.models.wxformer import CrossEmbedLayer, WXFormer

DOMAIN_CONVERTERS = {PeriodicConv2d: DomainParallelPeriodicConv2d, CrossEmbedLayer: SharedHalo}
"""For `convert_to_domain_parallel`: the layers of these models that are more than torch's own."""


MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "unet_diffusion": DiffusionUNet,
    "transformer": WindowTransformer,
    "wxformer": WXFormer,
    "pangu": Pangu,
}
"""The package's own, by `model.name`. Any other name is the dotted path of a user's class."""


def build_model(conf: Model, in_channels: int, out_channels: int, grid: tuple[int, int]) -> nn.Module:
    """The model that the config names, with torch's random numbers as they stand.

    Raises:
        ConfigError: if a dotted path does not lead to an nn.Module, or that does not take the config's arguments.
    """
    kind = load_model_class(conf.name) if isinstance(conf, Custom) else MODELS[conf.name]
    arguments = conf.model_dump(exclude={"name"})
    if isinstance(conf, Custom):
        _check_arguments(conf.name, kind, arguments)
    return kind(in_channels, out_channels, grid, **arguments)


def load_model_class(path: str) -> type[nn.Module]:
    """The class at a dotted path, such as `my_package.models.MyModel`.

    Raises:
        ConfigError: if its module cannot be imported, has no such name, or it is no subclass of nn.Module.
    """
    module_path, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_path), name, None)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"model.name: {path}: importing {module_path} failed with {type(error).__name__}: {error}. "
            f"Is it installed, or its directory on PYTHONPATH?"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        what = f"{module_path} has no {name}" if found is None else f"{path} is no subclass of torch.nn.Module"
        raise ConfigError(f"model.name: {what}")
    return found


def _check_arguments(path: str, kind: type[nn.Module], arguments: dict) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind("in_channels", "out_channels", "grid", **arguments)
    except TypeError as error:
        raise ConfigError(
            f"model: {path}{signature} cannot be called as {path.rpartition('.')[2]}(in_channels, out_channels, grid"
            f"{''.join(f', {key}=...' for key in arguments)}): {error}"
        ) from None
