"""The configuration of a run: strict, frozen, and checked before anything expensive starts.

A YAML file with one section a room, in the order of the data's way, plus `section.key=value` overrides.
Every error is a `ConfigError` whose message starts with the path of the key.
"""

from gkd.config.files import describe_keys, load_config, make_config
from gkd.config.mixture import MixtureConfig
from gkd.config.objective import ObjectiveConfig, ObjectiveSection, default_objective
from gkd.config.process import Launch, cache_folder, exit_copy
from gkd.config.sections import (
    DROPPABLE,
    ENDPOINT_PORT,
    MAIN_TEACHER,
    PROBE_TOKENS,
    SAMPLER_PORT,
    TEACHER_PORT,
    Config,
    DataConfig,
    DeepSpeedConfig,
    Dtype,
    LayerRule,
    LoraConfig,
    OptimConfig,
    RolloutConfig,
    StudentInit,
    TeacherConfig,
)

__all__ = [
    "DROPPABLE",
    "ENDPOINT_PORT",
    "MAIN_TEACHER",
    "PROBE_TOKENS",
    "SAMPLER_PORT",
    "TEACHER_PORT",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "Dtype",
    "Launch",
    "LayerRule",
    "LoraConfig",
    "MixtureConfig",
    "ObjectiveConfig",
    "ObjectiveSection",
    "OptimConfig",
    "RolloutConfig",
    "StudentInit",
    "TeacherConfig",
    "cache_folder",
    "default_objective",
    "describe_keys",
    "exit_copy",
    "load_config",
    "make_config",
]
