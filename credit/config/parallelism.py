"""How a model is laid out over ranks: the part of `trainer` that `credit.parallel` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import model_validator

from credit.config.fields import OF_THE_RUN, Block, Count, Flag, ProcessesOrAuto, ProcessesOrNone


class Parallelism(Block):
    """Ranks of the mesh (dp, tp, domain); dp is what the world leaves over."""

    data: Literal["fsdp2", "ddp", "none"] = "none"
    """Over the ranks that are left: none: one replica; ddp: replicas; fsdp2: replicas that share out parameters."""
    tensor: Count = 1
    """Ranks that share wide layers by channel."""
    domain: Count = 1
    """Ranks that share a field by latitude."""


class Sharding(Block):
    """Of a trainer: what decides where parameters, samples and rows lie, and what is computed twice."""

    parallelism: Parallelism = Parallelism()
    """How ranks make up the mesh."""
    precision: Annotated[Literal["ieee", "tf32", "bf16"], OF_THE_RUN] = "ieee"
    """Of products of float32: as IEEE has them; in TF32, on GPUs that have it: 3 digits, added up in float32, several
    times as fast; or in bfloat16, by autocast or FSDP2: 2 digits, half the memory; statistics of norms in float32."""
    dtype: Annotated[Literal["float32", "float64"], OF_THE_RUN] = "float32"
    """Of parameters, fields and gradients."""
    accumulate: Count = 1
    """Parts of a batch that are computed one after another, to save memory: the same numbers."""
    activation_checkpointing: Flag = False
    """Keep the inputs of blocks alone, and compute the rest again in the backward: less memory, more time."""
    compile: Flag = False
    """Compile blocks with torch.compile, or, where tensor or domain cut the model, all of it as it is recorded (see
    `record`): a minute or more first, then mostly shorter steps. There not with fsdp2."""
    record: Flag = False
    """Write down, once, what a model that is cut by tensor or domain does in a step, and replay it: the same bits with
    less work in Python. It takes seconds to minutes first. Not with fsdp2."""
    slices: ProcessesOrAuto = 1
    """Latitude slices that take turns on one device, each with the memory of one: the same numbers from a device that
    the model does not fit. auto: as few as fit its free memory. Without tensor, domain, fsdp2, compile and record."""
    shard_over: Literal["dp_domain", "dp"] = "dp_domain"
    """The ranks over which fsdp2 shards parameters and optimiser states."""
    reshard_after_forward: Flag = True
    """fsdp2: drop gathered parameters after the forward of their block; false saves traffic and costs memory."""
    prefetch: ProcessesOrNone = 0
    """fsdp2: blocks whose parameters are gathered ahead of the one that computes."""
    fallback: Literal["gather", "refuse"] = "gather"
    """An operation that has no sharded form: computed on the whole field by every domain rank, or refused."""

    @model_validator(mode="after")
    def _precision(self) -> Self:
        if self.dtype == "float64" and self.precision != "ieee":
            raise ValueError(
                f"precision: {self.precision} is of products of float32, and dtype: float64 has none: leave one out"
            )
        return self

    @classmethod
    def of(cls, conf: Self | Mapping[str, Any]) -> Self:
        """Of a whole config that is a dictionary, whose other keys are not looked at; defaults where it is silent.

        There `amp` of true, or bf16, is `precision: bf16`, as it is elsewhere.

        Raises:
            ValueError: naming the key that cannot be so.
        """
        from credit.config.loading import said_of

        if isinstance(conf, cls):
            return conf
        trainer = trainer_of(cast("Mapping[str, Any]", conf))
        given = {key: value for key, value in trainer.items() if key in cls.model_fields and value is not None}
        if trainer.get("amp") not in (None, False, "none"):
            given.setdefault("precision", "bf16" if trainer["amp"] is True else trainer["amp"])
        with said_of("trainer"):
            return cls.model_validate(given)


def trainer_of(conf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block of a whole config that is a dictionary; empty if there is none.

    Raises:
        ValueError: if it is no block.
    """
    trainer = dict(conf).pop("trainer", None) or {}
    if not isinstance(trainer, Mapping):
        raise ValueError(f"trainer must be a block of keys, got {trainer!r}")
    return trainer


Conf = Sharding | Mapping[str, Any]
"""How functions that are called with a whole config take it: parsed, or as the dictionary of its file."""
