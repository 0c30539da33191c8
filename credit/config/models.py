"""The `model` block of the config: a class for each model of the package, and one for a user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from credit.bounds import MOST_CHANNELS
from credit.config.fields import (
    Block,
    Channels,
    Count,
    CountOrNone,
    EvenChannels,
    Flag,
    Halvings,
    Layers,
    LayersOrNone,
    Text,
)


class OwnModel(Block):
    """A model of the package's own. A subclass is known by its `name` once it is defined: nothing else lists it."""

    name: str
    path: ClassVar[str]
    """Where its module is, so that reading a config imports no torch."""
    of_regions: ClassVar[bool] = False
    """Nothing but the padding of convolutions leads around the globe. (The windows of attention are laid around it.)"""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        MODELS[get_args(cls.model_fields["name"].annotation)[0]] = cls


MODELS: dict[str, type[OwnModel]] = {}
"""The blocks of the package's own models, by name."""


class UNet(OwnModel):
    name: Literal["unet"]
    path = "credit.models.unet.UNet"
    of_regions = True
    width: Channels = 32
    """Channels on the full grid; doubled at every level."""
    levels: Halvings = 2
    """How many times the grid is halved."""
    blocks: Layers = 1
    """Residual blocks at each level, on the way down and on the way up."""
    groups: Channels = 8
    """Groups of GroupNorm; must divide `width`."""

    @model_validator(mode="after")
    def _divides(self) -> UNet:
        if self.width % self.groups:
            raise ValueError(f"groups {self.groups} does not divide width {self.width}")
        return self


class DiffusionUNet(UNet):
    name: Literal["unet_diffusion"]  # type: ignore[assignment]
    path = "credit.models.unet_diffusion.DiffusionUNet"
    width: EvenChannels = 32
    """Channels on the full grid; doubled at every level."""
    heads: Annotated[int, Field(strict=True, ge=0, le=MOST_CHANNELS)] = 4
    """Heads of attention between all points of the coarsest grid; 0 for none."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DiffusionUNet:
        if self.heads and self.width * 2**self.levels % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width x 2^levels, {self.width * 2**self.levels}")
        return self


class Transformer(OwnModel):
    name: Literal["transformer"]
    path = "credit.models.transformer.WindowTransformer"
    width: EvenChannels = 64
    """Channels of the blocks, on the halved grid."""
    depth: Layers = 4
    """Number of blocks."""
    heads: Channels = 4
    """Heads of attention; must divide `width`, and `trainer.parallelism.tensor` must divide them."""
    window: Count = 4
    """Rows and columns of an attention window."""
    ratio: Layers = 4
    """Width of the mlp over `width`."""

    @model_validator(mode="after")
    def _divides(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class WXFormer(OwnModel):
    """Lists have an entry for each stage of the encoder."""

    name: Literal["wxformer"]
    path = "credit.models.wxformer.WXFormer"
    widths: Annotated[list[Channels], Field(min_length=1, max_length=16)] = [64, 128, 256, 512]
    """Channels of the stages; `head_width` and `groups` must divide them."""
    depths: list[Layers] = [2, 2, 8, 2]
    """Pairs of short- and long-distance attention."""
    kernels: list[Annotated[list[Count], Field(min_length=1)]] = [[4, 8, 16, 32], [2, 4], [2, 4], [2, 4]]
    """Sizes of the parallel convolutions that begin a stage: its stride, or more by an even number."""
    strides: list[Count] = [2, 2, 2, 2]
    """How many times coarser a stage is than the one before."""
    local_window: Count = 6
    """Rows and columns of a window of short-distance attention."""
    global_windows: list[Count] = [6, 6, 3, 3]
    """Rows and columns of points of long-distance attention; they lie as far apart as there are windows."""
    head_width: Channels = 32
    """Channels of a head of attention; `trainer.parallelism.tensor` must divide the heads of every stage."""
    ratio: Layers = 4
    """Width of the feed-forward networks over that of the stage."""
    decoder: Literal["transposed", "pixel_shuffle"] = "transposed"
    """How it gets back to finer grids: transposed convolutions, or pixel shuffle."""
    groups: Channels = 8
    """Groups of GroupNorm in the decoder."""
    padding: CountOrNone = 0
    """Rows and columns added on each side at least, across the poles and around the globe; more are, until the
    strides and windows of all stages fit."""
    spectral_norm: Flag = False
    """Divide weights by their largest singular value: steadier long forecasts."""

    @model_validator(mode="after")
    def _fits(self) -> WXFormer:
        for name in ("depths", "kernels", "strides", "global_windows"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, and widths has {len(self.widths)}")
        for width, kernels, stride in zip(self.widths, self.kernels, self.strides, strict=True):
            for name in ("head_width", "groups"):
                if width % getattr(self, name):
                    raise ValueError(f"{name} {getattr(self, name)} does not divide width {width}")
            if any(kernel < stride or (kernel - stride) % 2 for kernel in kernels):
                raise ValueError(f"kernels {kernels} must be their stride of {stride}, or more by an even number")
            if width >> (len(kernels) - 1) < 1:
                raise ValueError(f"width {width} cannot be halved for each of kernels {kernels}")
        return self


_Size = tuple[Count, Count, Count]


class Pangu(OwnModel):
    name: Literal["pangu"]
    path = "credit.models.pangu.Pangu"
    upper: Count
    """Variables on levels: the first of `data.variables`. The others, and what is given, are the surface."""
    levels: Count
    """Levels of each: as many as `data.levels`, from the ground up."""
    width: Channels = 192
    """Channels of a point."""
    depth: LayersOrNone = 2
    """Blocks on the grid of the points, before it is halved and again after."""
    coarse_depth: LayersOrNone = 12
    """Blocks on the halved grid, twice as wide; 0 to leave the grid as it is."""
    heads: Channels = 6
    """Heads of attention; must divide `width`, and `trainer.parallelism.tensor` must divide them."""
    window: _Size = (2, 6, 12)
    """Levels, latitudes and longitudes of an attention window, in points."""
    patch: _Size = (2, 4, 4)
    """Levels, latitudes and longitudes of the cube that is a point."""

    @model_validator(mode="after")
    def _divides(self) -> Pangu:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class Custom(BaseModel):
    """A class of the user's own: `name` is its dotted path, all other keys are arguments of its constructor.

    It is called as `Class(in_channels, out_channels, grid, **keys)`, and maps (batch, in_channels, latitude,
    longitude) to (batch, out_channels, latitude, longitude).
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[Text, Field(json_schema_extra={"pattern": r"\."})]
    """The dotted path."""


def class_path(model: OwnModel | Custom) -> str:
    """The dotted path of a model's nn.Module."""
    return model.name if isinstance(model, Custom) else model.path


def _kind(block: Any) -> str | None:
    """The tag of a `model` block, by its name."""
    name = block.get("name") if isinstance(block, dict) else getattr(block, "name", None)
    if not isinstance(name, str):
        return None
    return "custom" if "." in name else name if name in MODELS else None


TAGS: dict[Any, Any] = {**MODELS, "custom": Custom}
"""The kinds of model, which pydantic puts into the place of an error."""

if TYPE_CHECKING:
    Model = OwnModel | Custom
else:
    Model = Annotated[Union[*(Annotated[block, Tag(tag)] for tag, block in TAGS.items())], Discriminator(_kind)]
