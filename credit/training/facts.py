"""What makes two configs the same run: a checkpoint is gone on with, or forecast from, by no other."""

from __future__ import annotations

from typing import Any

from credit.config import Config
from credit.data.statistics import Statistics
from credit.errors import CheckpointError

DATA = ("path", "variables", "levels", "statics", "forcings", "step", "train", "gaps")
TRAINER = (
    *("batch_size", "amp", "seed", "epochs", "learning_rate", "warmup_steps", "weight_decay", "clip"),
    *("dtype", "ema", "init_from", "loss", "rollout", "rollout_detach"),
)


OF_TRAINING = ("data.path", "data.gaps", "trainer.amp")
"""What a forecast from the run may have otherwise."""


def run_facts(config: Config, statistics: Statistics) -> dict[str, Any]:
    """What must be the same."""
    conf = config.to_dict()
    return {
        "model": conf["model"],
        "data": {**{key: conf["data"][key] for key in DATA}, "statistics": statistics.digest},
        "trainer": {key: conf["trainer"][key] for key in TRAINER},
    }


def refuse_other_run(stored: dict[str, Any], wanted: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    """Raise a CheckpointError that lists every key in which two `run_facts` differ, `but` these."""
    different = [
        f"{block}.{key} was {stored[block].get(key)!r} and is {value!r}"
        for block, values in wanted.items()
        for key, value in values.items()
        if stored[block].get(key) != value and f"{block}.{key}" not in but
    ]
    if different:
        raise CheckpointError(
            f"the run directory holds a run of another config: {'; '.join(different)}. Set `run` to a new directory"
        )
