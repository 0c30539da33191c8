"""The `trainer` block."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from credit.config.fields import (
    OF_THE_RUN,
    Block,
    Count,
    Flag,
    NotNegative,
    OrText,
    Positive,
    Processes,
    Seed,
    Steps,
    StepsOrNone,
    Text,
    or_dotted,
    refuse_flag,
)
from credit.config.parallelism import Sharding

Level = Annotated[float, BeforeValidator(refuse_flag), Field(allow_inf_nan=False)]

LOSSES = ("mse", "mae", "huber", "crps")
SCHEDULES = ("cosine", "linear", "constant")


class Loss(Block):
    """What is minimised: the mean over samples, steps, channels and the area of the globe of an error in units of
    one step's root mean square change."""

    kind: Annotated[str, or_dotted(LOSSES)] = "mse"
    """mse, mae, huber, crps; or the dotted path of a function, `f(prediction, target, **arguments)`, or of a module,
    `Class(**arguments)(prediction, target)`, that gives the error of each entry. crps: of an ensemble, whose members
    the model makes from noise that it is given as one more input."""
    arguments: dict[str, Any] = {}
    """Of a loss by dotted path."""
    delta: Positive = 1.0
    """huber: half the square up to here, linear beyond."""
    members: Annotated[Processes, Field(ge=2)] = 4
    """crps: members that are trained together, of each sample; a forecast may have more."""
    variables: dict[str, NotNegative] = {}
    """Weights of variables among each other; 1 for one that is not named."""
    levels: dict[Level, NotNegative] = {}
    """Weights of levels, times that of the variable."""
    spectral: NotNegative = 0.0
    """Weight of a second term: squared differences of the amplitudes of all waves along each latitude."""

    @model_validator(mode="after")
    def _arguments_are_taken(self) -> Loss:
        if self.arguments and self.kind in LOSSES:
            raise ValueError(f"arguments are for a loss by dotted path; {self.kind} has keys of its own")
        return self

    @property
    def ensemble(self) -> int:
        """States that the model makes of each sample."""
        return self.members if self.kind == "crps" else 1


class InitFrom(Block):
    """Weights to start from, some of those in a file."""

    path: Text
    """Of the file."""
    only: list[Text] = ["*"]
    """Patterns of the parameters' and buffers' names to take, such as "encoder.*"."""
    skip: list[Text] = []
    """Patterns of those to leave as they are drawn."""


class Trainer(Sharding):
    """How to train."""

    epochs: Count
    """Times that all samples of the training period are seen."""
    batch_size: Annotated[Count, OF_THE_RUN]
    """Samples of one optimiser step, over all ranks: the loss curve does not depend on the mesh."""
    learning_rate: Annotated[Positive, OF_THE_RUN] = 1e-3
    """Of AdamW, after the warm-up."""
    schedule: Annotated[str, or_dotted(SCHEDULES), OF_THE_RUN] = "cosine"
    """Of the learning rate after the warm-up: cosine or linear, to zero; constant; or the dotted path of a function
    from the part of the steps that is done, 0 to 1, to a factor."""
    warmup_steps: Annotated[StepsOrNone, OF_THE_RUN] = 0
    """Steps in which the learning rate grows to its value, evenly."""
    weight_decay: Annotated[NotNegative, OF_THE_RUN] = 0.01
    """Of AdamW, decoupled."""
    clip: Annotated[Positive | None, OF_THE_RUN] = 1.0
    """Largest norm of the gradient of one step."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient is not finite: stop before the weights are touched, or go on without it."""
    deterministic: Flag = False
    """Only kernels that give the same bits each time; some are slower, and what has none is an error. A CPU has no
    others."""
    seed: Annotated[Seed, OF_THE_RUN] = 0
    """Of initial weights, the order of samples, dropout and noise."""
    loss: Annotated[Loss, OF_THE_RUN] = Loss()
    """What is minimised."""
    rollout: Annotated[Count, OF_THE_RUN] = 1
    """Steps that are forecast from each sample, each from what the one before made; the loss is their mean."""
    rollout_detach: Annotated[Flag, OF_THE_RUN] = False
    """No gradient from a step to the one before: each learns to correct its input, and memory is that of one step."""
    ema: Annotated[Annotated[Positive, Field(lt=1)] | None, OF_THE_RUN] = None
    """Decay of an exponential moving average of the weights, which validation and forecasts then use. It begins at
    2/11 and grows to this with the steps, so that the initial weights are soon forgotten."""
    init_from: Annotated[InitFrom | None, OrText(), OF_THE_RUN] = None
    """Weights to start from: a file that `credit export` wrote, or any state dict of the plain model; or a block of
    path, only and skip."""
    freeze: Annotated[list[Text], OF_THE_RUN] = []
    """Patterns of names of parameters that are not trained, such as "encoder.*"."""
    checkpoint_every: Steps = 500
    """Steps between checkpoints; there is one at the end of each epoch too."""
    keep: Count = 2
    """The newest checkpoints that are kept, beside that of the least validation loss."""
    patience: Count | None = None
    """Training ends after so many epochs in a row without a new least validation loss."""
    checkpoint_async: Flag = False
    """Write checkpoints in the background, from a copy in memory."""
    tensorboard: Flag = False
    """Write what log.csv and valid.csv hold for TensorBoard too, into `tensorboard` of the run directory."""
    timeout: Positive = 600
    """Seconds after which a rank stops waiting for its peers."""

    @field_validator("init_from", mode="before")
    @classmethod
    def _of_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _compiles(self) -> Trainer:
        cut = {axis: ranks for axis in ("tensor", "domain") if (ranks := getattr(self.parallelism, axis)) > 1}
        wanted = [name for name in ("compile", "record") if getattr(self, name)]
        if cut and wanted and self.parallelism.data == "fsdp2":
            (axis, ranks), *_ = cut.items()
            raise ValueError(
                f"{wanted[0]} with parallelism.{axis}: {ranks} records what the whole model does, and fsdp2 gathers "
                f"parameters meanwhile: take data: ddp or none, or leave {wanted[0]} out"
            )
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile and activation_checkpointing do not go together: leave one of them out")
        return self

    @model_validator(mode="after")
    def _slices(self) -> Trainer:
        parallelism = self.parallelism
        others = {
            f"parallelism.tensor: {parallelism.tensor}": parallelism.tensor > 1,
            f"parallelism.domain: {parallelism.domain}": parallelism.domain > 1,
            "parallelism.data: fsdp2": parallelism.data == "fsdp2",
            "compile": self.compile,
            "record": self.record,
        }
        found = [name for name, is_set in others.items() if is_set]
        if self.slices != 1 and found:
            raise ValueError(
                f"slices: {self.slices} is of a whole model on one device, and does not go together with {found[0]}: "
                f"leave one of them out"
            )
        return self
