"""Every setting of a run as frozen dataclasses, and the one function that fills them: `load`.

YAML files merge left to right, then `key.path=value` arguments. Units are in the names
(`budget_tokens`, `every_steps`). An unknown key is an error that names the nearest known one. Nothing here
knows jax: a config must load in milliseconds on a laptop.
"""

from easylm_mling.config.basics import Duration
from easylm_mling.config.data import DataConfig, HubDataset, SourceConfig, StageConfig, WeightingConfig
from easylm_mling.config.loading import differences, from_tree, load, to_tree, to_yaml
from easylm_mling.config.model import FAMILIES, ModelConfig, RopeScaling
from easylm_mling.config.run import (
    NOT_OF_THE_STEP,
    REMAT_NAMES,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
)
from easylm_mling.errors import ConfigError, check

__all__ = [
    "FAMILIES",
    "NOT_OF_THE_STEP",
    "REMAT_NAMES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Duration",
    "EvalConfig",
    "HubDataset",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "WeightingConfig",
    "check",
    "differences",
    "from_tree",
    "load",
    "to_tree",
    "to_yaml",
]
