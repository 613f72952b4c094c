"""Every setting of a run as frozen dataclasses, and the functions that fill them: `load` and `load_mixer`.

YAML files merge left to right, then `key.path=value` arguments. Units are in the names
(`budget_tokens`, `every_steps`). An unknown key is an error that names the nearest known one. Nothing here
imports jax: a config must load in milliseconds on a laptop.
"""

from easylm_mling.config.basics import Duration, Setting
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.config.data import DataConfig, HubDataset, SourceConfig, StageConfig, WeightingConfig
from easylm_mling.config.loading import build_key, from_tree, load, load_kept, load_mixer, to_yaml
from easylm_mling.config.lora import PROJECTIONS, LoraConfig
from easylm_mling.config.model import FAMILIES, ModelConfig, RopeScaling
from easylm_mling.config.run import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    MixerConfig,
    ProfileConfig,
    RunConfig,
)
from easylm_mling.config.step_tokens import StepTokens
from easylm_mling.config.train import (
    REMAT_NAMES,
    EarlierBatchSize,
    EmaConfig,
    OptimizerConfig,
    ProductsConfig,
    TrainConfig,
)
from easylm_mling.config.trees import Change, Leaf, differences, leaves, step_settings, to_tree
from easylm_mling.errors import ConfigError, check

__all__ = [
    "FAMILIES",
    "PROJECTIONS",
    "REMAT_NAMES",
    "Change",
    "CheckpointConfig",
    "ConfigError",
    "ConversationConfig",
    "DataConfig",
    "Duration",
    "EarlierBatchSize",
    "EmaConfig",
    "EvalConfig",
    "HubDataset",
    "Leaf",
    "LoraConfig",
    "LogConfig",
    "MeshConfig",
    "MixerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProductsConfig",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "Setting",
    "SourceConfig",
    "StageConfig",
    "StepTokens",
    "TrainConfig",
    "WeightingConfig",
    "build_key",
    "check",
    "differences",
    "from_tree",
    "leaves",
    "load",
    "load_kept",
    "load_mixer",
    "step_settings",
    "to_tree",
    "to_yaml",
]
