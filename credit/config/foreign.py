"""Keys of other packages' configs, NCAR's CREDIT foremost: what each is here, or why nothing is. One table, which
`credit migrate` carries out and errors about unknown keys quote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from credit.config.fields import parse_moment


@dataclass(frozen=True)
class Foreign:
    """A key of another package.

    Attributes:
        ours: dotted path of the key here; empty if there is none.
        why: what is different, or why there is none.
        turn: its value here. Raises ValueError for a value that cannot be one.
    """

    ours: str = ""
    why: str = ""
    turn: Callable[[Any], Any] = lambda value: value

    def __str__(self) -> str:
        if not self.ours:
            return f"it has no counterpart here: {self.why}"
        return f"here it is {self.ours}" + (f": {self.why}" if self.why else "")


def lookup(path: Sequence[Any]) -> Foreign | None:
    """What is known of a key by its place: the entry of the key, or of a block that it is in."""
    blocks = (_at(path[:length]) for length in range(len(path) - 1, 0, -1))
    return _at(path) or next((block for block in blocks if block is not None and not block.ours), None)


def hint(path: Sequence[Any]) -> Foreign | None:
    """What is known of a key that may stand in another block than theirs: by its place, or by its name, if one entry
    alone has it."""
    same = [entry for key, entry in FOREIGN.items() if key.rpartition(".")[2] == str(path[-1])]
    return _at(path) or (same[0] if len(same) == 1 else None)


def _at(path: Sequence[Any]) -> Foreign | None:
    place = ".".join(map(str, path))
    return FOREIGN.get(place) or next((FOREIGN[key] for key in _PATTERNS if fnmatchcase(place, key)), None)


def as_list(value: Any) -> list[Any]:
    """One alone is a list of one."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _hours(value: Any) -> str:
    return f"{value}h" if isinstance(value, int) else str(value)


def _years(value: Any) -> list[str]:
    begin, end = value
    return [f"{int(begin)}-01-01", f"{int(end)}-01-01"]


def _levels(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} counts the levels: list them, as the store numbers them")
    return value


def _amp(value: Any) -> str:
    return "bf16" if value else "ieee"


def _mode(value: Any) -> str:
    modes = {"fsdp": "fsdp2", "fsdp2": "fsdp2", "ddp": "ddp", "none": "none", None: "none"}
    if value not in modes:
        raise ValueError(f"{value!r} is none of {', '.join(filter(None, modes))}")
    return modes[value]


def _model(value: Any) -> str:
    if value not in ("crossformer", "wxformer"):
        raise ValueError(f"{value!r} is no model here: take one of docs/models.md, or the dotted path of its class")
    return "wxformer"


def _loss(value: Any) -> str:
    losses = {"mse": "mse", "mae": "mae", "l1": "mae", "huber": "huber", "almost-fair-crps": "crps"}
    if value not in losses:
        raise ValueError(f"{value!r} is no loss here: take mse, mae, huber or crps, or the dotted path of yours")
    return losses[value]


def _clip(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"{value!r}: clip is the largest norm of a gradient, a number")
    return value or None


def _rollout(value: Any) -> int:
    return int(value) + 1


def _schedule(value: Any) -> str:
    if "cosine" in str(value):
        return "cosine"
    raise ValueError(f"{value!r} is no schedule here: cosine, linear, constant, or the dotted path of a function")


def _weights(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or any(isinstance(one, list) for one in value.values()):
        raise ValueError("weights level by level: a channel's is trainer.loss.variables times trainer.loss.levels")
    return value


_COUNTED = Foreign(why="channels are counted from the variables and levels of data")
_STATISTICS = Foreign(why="`credit data stats` writes the statistics of the training period into the run directory")
_RESUMED = Foreign(why="the same command again resumes all of a run; trainer.init_from takes weights alone")
_FORECASTS = Foreign(why="forecasts go to forecast.zarr in the run directory, scores to scores.csv (`credit score`)")
_SITE = Foreign(why="job scripts are `credit init --site derecho` and `credit submit`")
_PATH = Foreign("data.path", "one list of all stores, each with any of the variables", as_list)
_FILES = Foreign(why="files are read as xarray reads them: names, axes, units and times are found in them")
_ONE_LOOP = Foreign(why="there is one trainer, and one reader of samples")
_FIXERS = Foreign(why="write constraints: nonnegative for tracers, conserve for mass and water (docs/training.md)")
_PREPARED = Foreign(why="fields are normalised, and forcings of time and place computed, from what data names")
_CPU = Foreign(why="parameters and optimizer states are sharded by fsdp2; none are kept on the host")
_EPOCH = Foreign(why="an epoch is all samples of the period")
_GRID = Foreign("data.grid", "[latitudes, longitudes], for `credit plan` while the stores are not here")
_VARIABLES = Foreign("data.variables", "the state, on levels or not: those on levels first", as_list)

FOREIGN: dict[str, Foreign] = {
    "save_loc": Foreign("run", "", os.path.expandvars),
    "seed": Foreign("trainer.seed"),
    "data.variables": _VARIABLES,
    "data.surface_variables": _VARIABLES,
    "data.diagnostic_variables": Foreign("data.diagnostics", "", as_list),
    "data.dynamic_forcing_variables": Foreign("data.forcings", "cos_zenith needs no store", as_list),
    "data.forcing_variables": Foreign("data.forcings", "data.hold says how long a stored value holds", as_list),
    "data.static_variables": Foreign("data.statics", "", as_list),
    "data.save_loc": _PATH,
    "data.save_loc_*": _PATH,
    "data.levels": Foreign("data.levels", "", _levels),
    "data.level_ids": Foreign("data.levels", "", _levels),
    "data.timestep": Foreign("data.step", "", _hours),
    "data.lead_time_periods": Foreign("data.step", "hours", _hours),
    "data.history_len": Foreign("data.history"),
    "data.forecast_len": Foreign("trainer.rollout", "steps beyond the first there, all steps here", _rollout),
    "data.valid_history_len": Foreign(why="validation is given as many states as training"),
    "data.valid_forecast_len": Foreign(why="validation rolls out as far as training"),
    "data.train_years": Foreign("data.train", "from the beginning of the first year to that of the last", _years),
    "data.valid_years": Foreign("data.valid", "from the beginning of the first year to that of the last", _years),
    "data.start_datetime": Foreign("data.train", "[from, to)"),
    "data.end_datetime": Foreign("data.train", "[from, to)"),
    "data_valid.start_datetime": Foreign("data.valid", "[from, to)"),
    "data_valid.end_datetime": Foreign("data.valid", "[from, to)"),
    "data_valid": Foreign(why="data.valid is a period of the same stores, and all else is that of training"),
    "data.scaler_type": _STATISTICS,
    "data.mean_path": _STATISTICS,
    "data.std_path": _STATISTICS,
    "data.backprop_on_timestep": Foreign(why="the loss is of all steps; rollout_detach stops gradients between"),
    "data.one_shot": Foreign(why="the loss is of all steps of a rollout"),
    "data.skip_periods": Foreign(why="samples start at every stored time of the period"),
    "data.static_first": Foreign(why="the model is given states, forcings, statics, in this order"),
    "data.sst_forcing": Foreign(why="name the field in data.forcings"),
    "data.dataset_type": _ONE_LOOP,
    "data.source.*.levels": Foreign("data.levels", "", _levels),
    "data.source.*.variables.prognostic.vars_3D": _VARIABLES,
    "data.source.*.variables.prognostic.vars_2D": _VARIABLES,
    "data.source.*.variables.diagnostic.vars_*D": Foreign("data.diagnostics", "", as_list),
    "data.source.*.variables.dynamic_forcing.vars_*D": Foreign("data.forcings", "cos_zenith needs no store", as_list),
    "data.source.*.variables.static.vars_*D": Foreign("data.statics", "", as_list),
    "data.source.*.variables.*.path": _PATH,
    "data.source": _FILES,
    "model.type": Foreign("model.name", "its weights need its own class, by a dotted path", _model),
    "model.frames": Foreign("data.history"),
    "model.image_height": _GRID,
    "model.image_width": _GRID,
    "model.levels": Foreign(
        why="there it counts the levels of the fields, which data.levels lists; here, in a unet, it counts halvings"
    ),
    "model.channels": _COUNTED,
    "model.surface_channels": _COUNTED,
    "model.input_only_channels": _COUNTED,
    "model.output_only_channels": _COUNTED,
    "model.patch_height": Foreign(why="the first of model.strides is the patch"),
    "model.patch_width": Foreign(why="the first of model.strides is the patch"),
    "model.frame_patch_size": Foreign(why="states of the history are channels"),
    "model.dim": Foreign("model.widths", "", as_list),
    "model.depth": Foreign("model.depths", "", as_list),
    "model.dim_head": Foreign("model.head_width"),
    "model.global_window_size": Foreign("model.global_windows", "", as_list),
    "model.local_window_size": Foreign("model.local_window"),
    "model.cross_embed_kernel_sizes": Foreign("model.kernels"),
    "model.cross_embed_strides": Foreign("model.strides"),
    "model.use_spectral_norm": Foreign("model.spectral_norm"),
    "model.attn_dropout": Foreign(why="the wxformer here draws nothing"),
    "model.ff_dropout": Foreign(why="the wxformer here draws nothing"),
    "model.interp": Foreign(why="the decoder ends on the grid of the data by cropping its padding"),
    "model.padding_conf.pad_lat": Foreign("model.padding", "one number for all sides, the largest"),
    "model.padding_conf.pad_lon": Foreign("model.padding", "one number for all sides, the largest"),
    "model.padding_conf": Foreign(why="the field is padded across the poles and around the globe"),
    "model.post_conf": _FIXERS,
    "postblocks": _FIXERS,
    "preblocks": _PREPARED,
    "trainer.type": _ONE_LOOP,
    "trainer.mode": Foreign("trainer.parallelism.data", "", _mode),
    "trainer.train_batch_size": Foreign("trainer.batch_size", "of each GPU there, over all ranks here"),
    "trainer.valid_batch_size": Foreign(why="validation takes batches of trainer.batch_size"),
    "trainer.grad_accum_every": Foreign("trainer.accumulate", "batch_size counts all parts"),
    "trainer.use_ema": Foreign("trainer.ema", "the decay; leave it out for none"),
    "trainer.ema_decay": Foreign("trainer.ema"),
    "trainer.grad_max_norm": Foreign("trainer.clip", "", _clip),
    "trainer.amp": Foreign("trainer.precision", "bf16 or ieee", _amp),
    "trainer.mixed_precision": Foreign("trainer.precision", "bf16 or ieee", _amp),
    "trainer.activation_checkpoint": Foreign("trainer.activation_checkpointing", "", bool),
    "trainer.thread_workers": Foreign("data.workers"),
    "trainer.prefetch_factor": Foreign("data.prefetch"),
    "trainer.stopping_patience": Foreign("trainer.patience"),
    "trainer.num_epoch": Foreign(why="trainer.epochs counts all; a job that is stopped goes on with the same command"),
    "trainer.start_epoch": _RESUMED,
    "trainer.reload_epoch": _RESUMED,
    "trainer.load_*": _RESUMED,
    "trainer.skip_validation": Foreign(why="the best checkpoint is that of the least validation loss"),
    "trainer.update_learning_rate": _RESUMED,
    "trainer.batches_per_epoch": _EPOCH,
    "trainer.valid_batches_per_epoch": _EPOCH,
    "trainer.valid_thread_workers": Foreign(why="validation is read by data.workers, too"),
    "trainer.cpu_offload": _CPU,
    "trainer.use_scheduler": Foreign("trainer.schedule", "constant for none"),
    "trainer.scheduler.scheduler_type": Foreign("trainer.schedule", "", _schedule),
    "trainer.scheduler.warmup_steps": Foreign("trainer.warmup_steps"),
    "trainer.scheduler": Foreign(why="after trainer.warmup_steps the schedule runs over all steps, to zero"),
    "trainer.save_best_weights": Foreign(why="that of the least validation loss is kept; forecast.checkpoint: best"),
    "trainer.save_backup_weights": Foreign(why="trainer.keep counts the newest checkpoints that stay"),
    "trainer.save_every_epoch": Foreign(why="trainer.keep counts the newest checkpoints that stay"),
    "trainer.compile": Foreign("trainer.compile", "", bool),
    "loss.training_loss": Foreign("trainer.loss.kind", "in units of a step's change of each channel", _loss),
    "loss.training_loss_parameters": Foreign("trainer.loss.arguments", "of a loss by dotted path"),
    "loss.use_latitude_weights": Foreign(why="rows count by their area, always"),
    "loss.latitude_weights": Foreign(why="areas of rows follow from the latitudes of the stores"),
    "loss.use_variable_weights": Foreign(why="weights that are given count"),
    "loss.variable_weights": Foreign("trainer.loss.variables", "among each other, 1 by default", _weights),
    "loss.use_spectral_loss": Foreign(why="trainer.loss.spectral is the weight of such a term"),
    "loss.spectral_lambda_reg": Foreign("trainer.loss.spectral"),
    "loss.use_power_loss": Foreign(why="trainer.loss.spectral compares amplitudes of waves along latitudes"),
    "loss": Foreign(why="the loss is a block of the trainer: trainer.loss"),
    "predict.forecasts.days": Foreign("forecast.lead", "", lambda days: f"{days}d"),
    "predict.forecasts.start_*": Foreign("data.test", "from the first start to the end of the last forecast"),
    "predict.forecasts.duration": Foreign("data.test", "from the first start to the end of the last forecast"),
    "predict": _FORECASTS,
    "pbs": _SITE,
    "slurm": _SITE,
}
"""By dotted path in their file; a block's entry stands for all keys in it that have none."""
_PATTERNS = [key for key in FOREIGN if "*" in key]


def moment(value: Any) -> str:
    """A time as it stands in a config."""
    return parse_moment(value).isoformat()
