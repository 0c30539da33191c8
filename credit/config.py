"""The config file: every key, its type, unit and default. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from credit.errors import ConfigError


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, Field(ge=1)]
Period = tuple[datetime, datetime]


def parse_hours(value: Any) -> int:
    """Hours of "6h" or "5d"."""
    text = str(value).strip()
    unit = {"h": 1, "d": 24}.get(text[-1:])
    if unit is None or not text[:-1].isdigit() or int(text[:-1]) == 0:
        raise ValueError(f'{value!r} is no duration; write hours or days, like "6h" or "5d"')
    return int(text[:-1]) * unit


class Data(_Block):
    """Which fields, from where."""

    path: str
    """A zarr store or netCDF file (relative to the working directory); or "demo" or "era5-sample", which come
    with the package."""
    variables: Annotated[list[str], Field(min_length=1)]
    """What the model predicts, by name in the store."""
    levels: list[float] = []
    """Levels to take of variables that have them, as the store numbers them."""
    statics: list[str] = []
    """Fields without time: from the store, or sin_latitude, cos_latitude, sin_longitude, cos_longitude."""
    forcings: list[str] = []
    """Given, not predicted, at the start of a step: from the store, or cos_zenith (the sun's)."""
    step_hours: Annotated[int, Field(alias="step")]
    """Time from input to output, such as "6h"."""
    train: Period
    valid: Period
    test: Period
    """Periods [from, to): a sample belongs to the period that holds all its times."""
    gaps: Literal["refuse", "skip"] = "refuse"
    """Times whose successor one step later is missing: refuse the store, or skip those times."""
    stats: str | None = None
    """Statistics written by `credit data stats`; stats.nc in the run directory by default."""
    in_memory: bool = False
    """Read this rank's rows of the whole store once, and keep them."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes of each rank that read batches while it computes; 0: the rank reads."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Batches that each worker reads ahead."""

    @field_validator("step_hours", mode="before")
    @classmethod
    def _hours(cls, value: Any) -> int:
        return parse_hours(value)

    @field_validator("train", "valid", "test")
    @classmethod
    def _forwards(cls, period: Period) -> Period:
        if period[0] >= period[1]:
            raise ValueError(f"the period starts at {period[0]} and ends at {period[1]}")
        return period

    @model_validator(mode="after")
    def _apart(self) -> Data:
        periods = sorted([("train", self.train), ("valid", self.valid), ("test", self.test)], key=lambda p: p[1])
        for (name, period), (other, later) in itertools.pairwise(periods):
            if period[1] > later[0]:
                raise ValueError(f"{name} and {other} share times: scores would be of what was trained on")
        return self

    @model_validator(mode="after")
    def _reads_once(self) -> Data:
        if self.workers and self.in_memory:
            raise ValueError(f"in_memory leaves nothing to read for workers: {self.workers}; set one of the two")
        return self


class UNet(_Block):
    """`credit.models.unet.UNet`."""

    name: Literal["unet"]
    width: Annotated[int, Field(ge=1)] = 32
    """Channels on the full grid; doubled at every level."""
    levels: Annotated[int, Field(ge=0)] = 2
    """How many times the grid is halved."""
    blocks: Annotated[int, Field(ge=1)] = 1
    """Residual blocks at each level, on the way down and on the way up."""
    groups: Annotated[int, Field(ge=1)] = 8
    """Groups of GroupNorm; must divide `width`."""

    @model_validator(mode="after")
    def _divides(self) -> UNet:
        if self.width % self.groups:
            raise ValueError(f"groups {self.groups} does not divide width {self.width}")
        return self


class Transformer(_Block):
    """`credit.models.transformer.WindowTransformer`."""

    name: Literal["transformer"]
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Channels of the blocks, on the halved grid."""
    depth: Annotated[int, Field(ge=1)] = 4
    """Number of blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Heads of attention; must divide `width`, and `trainer.parallelism.tensor` must divide them."""
    window: Annotated[int, Field(ge=1)] = 4
    """Rows and columns of an attention window."""
    ratio: Annotated[int, Field(ge=1)] = 4
    """Width of the mlp over `width`."""

    @model_validator(mode="after")
    def _divides(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class WXFormer(_Block):
    """`credit.models.wxformer.WXFormer`. Lists have an entry for each stage of the encoder."""

    name: Literal["wxformer"]
    widths: Annotated[list[Count], Field(min_length=1)] = [64, 128, 256, 512]
    """Channels of the stages; `head_width` and `groups` must divide them."""
    depths: list[Count] = [2, 2, 8, 2]
    """Pairs of short- and long-distance attention."""
    kernels: list[Annotated[list[Count], Field(min_length=1)]] = [[4, 8, 16, 32], [2, 4], [2, 4], [2, 4]]
    """Sizes of the parallel convolutions that begin a stage: its stride, or more by an even number."""
    strides: list[Count] = [2, 2, 2, 2]
    """How many times coarser a stage is than the one before."""
    local_window: Count = 6
    """Rows and columns of a window of short-distance attention."""
    global_windows: list[Count] = [6, 6, 3, 3]
    """Rows and columns of points of long-distance attention; they lie as far apart as there are windows."""
    head_width: Count = 32
    """Channels of a head of attention; `trainer.parallelism.tensor` must divide the heads of every stage."""
    ratio: Count = 4
    """Width of the feed-forward networks over that of the stage."""
    decoder: Literal["transposed", "pixel_shuffle"] = "transposed"
    """How it gets back to finer grids: transposed convolutions, or pixel shuffle."""
    groups: Count = 8
    """Groups of GroupNorm in the decoder."""
    padding: Annotated[int, Field(ge=0)] = 0
    """Rows and columns added on each side at least, across the poles and around the globe; more are, until the
    strides and windows of all stages fit."""
    spectral_norm: bool = False
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


class DiffusionUNet(UNet):
    """`credit.models.unet_diffusion.DiffusionUNet`."""

    name: Literal["unet_diffusion"]  # type: ignore[assignment]
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    heads: Annotated[int, Field(ge=0)] = 4
    """Heads of attention between all points of the coarsest grid; 0 for none."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DiffusionUNet:
        if self.heads and self.width * 2**self.levels % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width x 2^levels, {self.width * 2**self.levels}")
        return self


_Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class Pangu(_Block):
    """`credit.models.pangu.Pangu`."""

    name: Literal["pangu"]
    upper: Annotated[int, Field(ge=1)]
    """Variables on levels: the first of `data.variables`. The others, and what is given, are the surface."""
    levels: Annotated[int, Field(ge=1)]
    """Levels of each: as many as `data.levels`, from the ground up."""
    width: Annotated[int, Field(ge=1)] = 192
    """Channels of a point."""
    depth: Annotated[int, Field(ge=0)] = 2
    """Blocks on the grid of the points, before it is halved and again after."""
    coarse_depth: Annotated[int, Field(ge=0)] = 12
    """Blocks on the halved grid, twice as wide; 0 to leave the grid as it is."""
    heads: Annotated[int, Field(ge=1)] = 6
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

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


MODELS: dict[str, type[_Block]] = {
    "unet": UNet,
    "unet_diffusion": DiffusionUNet,
    "transformer": Transformer,
    "wxformer": WXFormer,
    "pangu": Pangu,
}
"""The blocks of the package's own models, by name."""


def _kind(block: Any) -> str | None:
    """The tag of a `model` block, by its name."""
    name = block.get("name") if isinstance(block, dict) else getattr(block, "name", None)
    if not isinstance(name, str):
        return None
    return "custom" if "." in name else name if name in MODELS else None


Model = Annotated[
    Annotated[UNet, Tag("unet")]
    | Annotated[DiffusionUNet, Tag("unet_diffusion")]
    | Annotated[Transformer, Tag("transformer")]
    | Annotated[WXFormer, Tag("wxformer")]
    | Annotated[Pangu, Tag("pangu")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(_kind),
]


class Parallelism(_Block):
    """Ranks of the mesh (dp, tp, domain); dp is what the world leaves over."""

    data: Literal["fsdp2", "ddp", "none"] = "none"
    tensor: Annotated[int, Field(ge=1, strict=True)] = 1
    domain: Annotated[int, Field(ge=1, strict=True)] = 1


Weight = Annotated[float, Field(ge=0)]


class Loss(_Block):
    """What is minimised: the mean over samples, steps, channels and the area of the globe of an error in units of
    one step's root mean square change."""

    kind: Literal["mse", "mae", "huber", "crps"] = "mse"
    """crps: of an ensemble, whose members the model makes from noise that it is given as one more input."""
    delta: Annotated[float, Field(gt=0)] = 1.0
    """huber: half the square up to here, linear beyond."""
    members: Annotated[int, Field(ge=2)] = 4
    """crps: members that are trained together, of each sample; a forecast may have more."""
    variables: dict[str, Weight] = {}
    """Weights of variables among each other; 1 for one that is not named."""
    levels: dict[float, Weight] = {}
    """Weights of levels, times that of the variable."""
    spectral: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second term: squared differences of the amplitudes of all waves along each latitude."""

    @property
    def ensemble(self) -> int:
        """States that the model makes of each sample."""
        return self.members if self.kind == "crps" else 1


class Trainer(_Block):
    """How to train."""

    parallelism: Parallelism = Parallelism()
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Samples of one optimiser step, over all ranks: the loss curve does not depend on the mesh."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient of one step."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient is not finite: stop before the weights are touched, or go on without it."""
    amp: Literal["none", "bf16"] = "none"
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Parts of a batch that are computed one after another, to save memory: the same numbers."""
    loss: Loss = Loss()
    rollout: Annotated[int, Field(ge=1)] = 1
    """Steps that are forecast from each sample, each from what the one before made; the loss is their mean."""
    rollout_detach: bool = False
    """No gradient from a step to the one before: each learns to mend what it is given, and memory is that of one."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which validation and forecasts then use."""
    activation_checkpointing: bool = False
    """Keep the inputs of blocks alone, and compute the rest again in the backward: less memory, more time."""
    compile: bool = False
    """Compile blocks with torch.compile: a minute or more first, then mostly shorter steps. For replicas alone."""
    shard_over: Literal["dp_domain", "dp"] = "dp_domain"
    """The ranks over which fsdp2 shards parameters and optimiser states."""
    reshard_after_forward: bool = True
    """fsdp2: drop gathered parameters after the forward of their block; false saves traffic and costs memory."""
    prefetch: Annotated[int, Field(ge=0)] = 0
    """fsdp2: blocks whose parameters are gathered ahead of the one that computes."""
    fallback: Literal["gather", "refuse"] = "gather"
    """An operation that has no sharded form: computed on the whole field by every domain rank, or refused."""
    init_from: str | None = None
    """Weights to start from: a file that `credit export` wrote, or any state dict of the plain model."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; there is one at the end too."""
    checkpoint_async: bool = False
    """Write checkpoints in the background, from a copy in memory."""
    tensorboard: bool = False
    """Write what log.csv and valid.csv hold for TensorBoard too, into `tensorboard` of the run directory."""
    timeout: Annotated[float, Field(gt=0)] = 600
    """Seconds after which a rank stops waiting for its peers."""

    @model_validator(mode="after")
    def _compiles(self) -> Trainer:
        cut = {axis: ranks for axis in ("tensor", "domain") if (ranks := getattr(self.parallelism, axis)) > 1}
        if self.compile and cut:
            (axis, ranks), *_ = cut.items()
            raise ValueError(
                f"compile has nothing to gain with parallelism.{axis}: {ranks}, where layers and exchanges are run one "
                f"by one; leave it out, or take replicas alone"
            )
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile and activation_checkpointing do not go together: leave one of them out")
        return self


class Forecast(_Block):
    """What `credit forecast` makes of the test period."""

    lead_hours: Annotated[int, Field(alias="lead")]
    """Length of a forecast, such as "5d"."""
    every: Annotated[int, Field(ge=1)] = 1
    """A forecast from every n-th start of the test period."""
    members: Annotated[int, Field(ge=1)] = 1
    """Of the ensemble from each start; more than one for a model that was trained by the crps."""

    @field_validator("lead_hours", mode="before")
    @classmethod
    def _hours(cls, value: Any) -> int:
        return parse_hours(value)


class Config(_Block):
    """A whole config file."""

    run: Path
    """The run directory (relative to the working directory): everything is written there and nowhere else."""
    data: Data
    model: Model
    trainer: Trainer
    forecast: Forecast

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.forecast.lead_hours % self.data.step_hours:
            raise ValueError(f"forecast.lead {self.forecast.lead_hours} h is not a multiple of data.step")
        levels = len(self.data.levels)
        if isinstance(self.model, Pangu) and levels and self.model.levels != levels:
            raise ValueError(f"model.levels is {self.model.levels}, and data.levels names {levels}")
        loss = self.trainer.loss
        if self.forecast.members > loss.ensemble == 1:
            raise ValueError(
                f"forecast.members: {self.forecast.members} would all be the same: a model that is trained by "
                f"trainer.loss.kind: {loss.kind} gives one state; by crps it learns to give many"
            )
        for name, given, known in (
            ("variables", loss.variables, self.data.variables),
            ("levels", loss.levels, self.data.levels),
        ):
            unknown = [key for key in given if key not in known]
            if unknown:
                raise ValueError(f"trainer.loss.{name}: {unknown[0]} is not among data.{name}: {known}")
        return self

    @property
    def noise_channels(self) -> int:
        """Inputs by which the members of an ensemble differ."""
        return int(self.trainer.loss.ensemble > 1)

    @property
    def given_channels(self) -> int:
        """Inputs that the model does not predict: forcings, statics, noise."""
        return len(self.data.forcings) + len(self.data.statics) + self.noise_channels

    @property
    def stats_path(self) -> Path:
        return Path(self.data.stats) if self.data.stats else self.run / "stats.nc"

    def to_dict(self) -> dict[str, Any]:
        """As it would stand in a file."""
        values = self.model_dump(mode="json")
        values["data"]["step"] = f"{values['data'].pop('step_hours')}h"
        values["forecast"]["lead"] = f"{values['forecast'].pop('lead_hours')}h"
        return values

    @property
    def digest(self) -> str:
        """Equal for equal configs, across processes."""
        return hashlib.blake2b(yaml.safe_dump(self.to_dict()).encode(), digest_size=8).hexdigest()


def load_config(path: str | Path, replace: Sequence[str] = ()) -> Config:
    """Read and check a YAML config.

    Args:
        replace: assignments such as "trainer.epochs=2", made after reading; values are YAML.

    Raises:
        ConfigError: naming the file, and each key that is unknown, missing or of a wrong type.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold the keys {', '.join(Config.model_fields)}")
    for assignment in replace:
        _assign(raw, assignment)
    return parse_config(raw, str(path))


def _assign(raw: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    *parents, last = key.split(".")
    if not equals or not last:
        raise ConfigError(f"cannot set {assignment!r}: write it as trainer.epochs=2")
    block = raw
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            raise ConfigError(f"cannot set {key}: {parent} is a value, not a block")
    block[last] = yaml.safe_load(value)


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Check a config given as a dictionary; see `load_config`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = [_explain(one) for one in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(found), found) from None


_TAGS: dict[Any, Any] = {**MODELS, "custom": Custom}
"""The kinds of model, which pydantic puts into the place of an error."""


def _explain(error: Any) -> str:
    where = ".".join(str(key) for key in error["loc"] if key not in _TAGS) or "config"
    if error["type"] == "extra_forbidden":
        known = _keys_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if error["type"].startswith("union_tag"):
        given = error["input"]
        got = given.get("name") if isinstance(given, dict) else given
        return f"{where}.name: must be one of {', '.join(MODELS)}, or the dotted path of a class, got {got!r}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys, as written in a file, of the block at a location."""
    block: Any = Config
    for key in location:
        if key in _TAGS:
            block = _TAGS[str(key)]
            continue
        fields = {field.alias or name: field.annotation for name, field in block.model_fields.items()}
        kinds = (fields[str(key)], *get_args(fields[str(key)]))
        block = next((kind for kind in kinds if hasattr(kind, "model_fields")), block)
    return [field.alias or name for name, field in block.model_fields.items()]
