"""The config file: every key, its type, unit and default, a module for each block.

Unknown keys are refused with the nearest known one. Light to import: no torch.
"""

from credit.config.data import Data
from credit.config.fields import Source
from credit.config.forecast import Forecast
from credit.config.loading import load_config, parse_config
from credit.config.parallelism import Parallelism, Sharding
from credit.config.trainer import InitFrom, Loss, Trainer
from credit.config.whole import Config, Constraint

__all__ = [
    "Config",
    "Constraint",
    "Data",
    "Forecast",
    "InitFrom",
    "Loss",
    "Parallelism",
    "Sharding",
    "Source",
    "Trainer",
    "load_config",
    "parse_config",
]
