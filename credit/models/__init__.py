"""Models: plain PyTorch modules that know nothing of ranks."""

from __future__ import annotations

from torch import nn

from credit.config import Model
from credit.domain_parallel import DomainParallelPeriodicConv2d
from credit.models.pangu import Pangu
from credit.models.sphere import PeriodicConv2d
from credit.models.transformer import WindowTransformer
from credit.models.unet import UNet
from credit.models.unet_diffusion import DiffusionUNet

DOMAIN_CONVERTERS = {PeriodicConv2d: DomainParallelPeriodicConv2d}
"""For `convert_to_domain_parallel`: the layers of these models that are more than torch's own."""


MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "transformer": WindowTransformer,
    "unet_diffusion": DiffusionUNet,
    "pangu": Pangu,
}


def build_model(conf: Model, in_channels: int, out_channels: int, grid: tuple[int, int]) -> nn.Module:
    """The model that the config names, with torch's random numbers as they stand."""
    return MODELS[conf.name](in_channels, out_channels, grid, **conf.model_dump(exclude={"name"}))
