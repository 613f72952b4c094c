"""Every setting of a run as frozen dataclasses, and the one function that fills them: `load`.

YAML files merge left to right, then `key.path=value` arguments. Units are in the names
(`budget_tokens`, `every_steps`). An unknown key is an error that names the nearest known one. Nothing here
knows jax: a config must load in milliseconds on a laptop.
"""

from easylm_mling.config.basics import Duration, Setting
from easylm_mling.config.data import DataConfig, HubDataset, SourceConfig, StageConfig, WeightingConfig
from easylm_mling.config.loading import (
    Change,
    Leaf,
    differences,
    from_tree,
    leaves,
    load,
    load_mixer,
    step_settings,
    to_tree,
    to_yaml,
)
from easylm_mling.config.model import FAMILIES, ModelConfig, RopeScaling
from easylm_mling.config.run import (
    REMAT_NAMES,
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    MixerConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
)
from easylm_mling.errors import ConfigError, check

__all__ = [
    "FAMILIES",
    "REMAT_NAMES",
    "Change",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Duration",
    "EvalConfig",
    "HubDataset",
    "Leaf",
    "LogConfig",
    "MeshConfig",
    "MixerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "Setting",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "WeightingConfig",
    "check",
    "differences",
    "from_tree",
    "leaves",
    "load",
    "load_mixer",
    "step_settings",
    "to_tree",
    "to_yaml",
]
