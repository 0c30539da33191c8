"""What makes two configs the same run: no other may resume or forecast from its checkpoints."""

from __future__ import annotations

from typing import Any

from credit.config import Config, Data, Trainer
from credit.config.fields import OF_THE_RUN, Block
from credit.data.grid import Grid
from credit.data.statistics import Statistics
from credit.errors import CheckpointError

OF_TRAINING = ("data.path", "data.sources", "data.gaps", "data.valid", "trainer.precision", "trainer.stages")
"""What a forecast from the run may have otherwise."""


def run_facts(config: Config, statistics: Statistics, grid: Grid) -> dict[str, Any]:
    """What must be the same."""
    conf = config.to_dict()
    return {
        "model": {**conf["model"], "constraints": conf["constraints"]},
        "data": {**_marked(config.data, conf["data"]), "statistics": statistics.digest, "grid": str(grid)},
        "trainer": {"stages": [config.trainer.epochs], **_marked(config.trainer, conf["trainer"])},
    }


def _marked(block: Block, values: dict[str, Any]) -> dict[str, Any]:
    """Of the values of a block as they stand in a file, those of keys that make a run what it is."""
    return {key: values[key] for key, field in type(block).model_fields.items() if OF_THE_RUN in field.metadata}


def stages_after(stored: dict[str, Any], done: int, epochs: int) -> list[int]:
    """The epochs in all at the end of each stage of a run: epochs that are added to a finished one are one more.

    Args:
        stored: facts of the checkpoint to go on from.
        done: its epochs.
        epochs: that are wanted.

    Raises:
        CheckpointError: if epochs would be added before the run has finished, or taken away.
    """
    stages = [*stored.get("trainer", {}).get("stages", [epochs])]
    if epochs == stages[-1]:
        return stages
    if epochs > stages[-1] == done:
        return [*stages, epochs]
    raise CheckpointError(
        f"trainer.epochs was {stages[-1]} and is {epochs}, and the run is at epoch {done}: the learning rates of its "
        f"steps would have been others. Finish it first, then add epochs; or set `run` to a new directory"
    )


def differences(stored: dict[str, Any], wanted: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """Every key in which two `run_facts` differ, `but` these. One that was not known then had its default."""
    found = []
    for block, values in wanted.items():
        before = {**_defaults(block), **stored.get(block, {})}
        for key, value in values.items():
            if before.get(key) != value and f"{block}.{key}" not in but:
                found.append(f"{block}.{key} was {before.get(key)!r} and is {value!r}")
    return found


def _defaults(block: str) -> dict[str, Any]:
    kinds: dict[str, type[Block]] = {"data": Data, "trainer": Trainer}
    fields = kinds[block].model_fields if block in kinds else {}
    return {name: field.default for name, field in fields.items() if not field.is_required()}


def refuse_other_run(stored: dict[str, Any], wanted: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    """Raise a CheckpointError that lists every key in which two `run_facts` differ, `but` these."""
    different = differences(stored, wanted, but)
    if different:
        raise CheckpointError(
            f"the run directory holds a run of another config: {'; '.join(different)}. Set `run` to a new directory"
        )


def refuse_other_weights(stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a CheckpointError if weights are of another model, or of fields with other statistics.

    Args:
        stored: what `credit export` wrote beside the weights; nothing is known of others.
    """
    matters: dict[str, Any] = {block: wanted[block] for block in ("model", "data") if block in stored}
    different = differences(stored, matters, but=(*OF_TRAINING, "data.train"))
    if different:
        raise CheckpointError(f"forecast.weights are of another config: {'; '.join(different)}")
