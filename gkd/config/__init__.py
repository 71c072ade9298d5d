"""The configuration of a run: strict, frozen, and checked before anything expensive starts.

A YAML file with one section a room, in the order of the data's way, plus `section.key=value` overrides.
Every error is a `ConfigError` whose message starts with the path of the key.
"""

from gkd.config.addresses import ENDPOINT_PORT, SAMPLER_PORT, TEACHER_PORT
from gkd.config.advice import advice, advice_on_share
from gkd.config.choices import Choice, known
from gkd.config.config import MAIN_TEACHER, PROBE_TOKENS, Config
from gkd.config.files import describe_keys, load_config, make_config, make_section, read_mapping
from gkd.config.mixture import MixtureConfig
from gkd.config.objective import ObjectiveConfig, ObjectiveSection, default_objective
from gkd.config.precision import dtypes_of, fastest_here, settled_option
from gkd.config.process import Launch, cache_folder, exit_copy, instruction_limits
from gkd.config.sampler_choices import lone_choices, served_choices
from gkd.config.sections import (
    DROPPABLE,
    CollapseConfig,
    DataConfig,
    DeepSpeedConfig,
    Dtype,
    DtypeOrAuto,
    LayerRule,
    OptimConfig,
    ReplayConfig,
    RolloutConfig,
)
from gkd.config.settle import Machine, Settled, settle, settled_values
from gkd.config.student import LoraConfig, QuantizeConfig, StudentInit, StudentWidth
from gkd.config.teachers import TeacherConfig

__all__ = [
    "DROPPABLE",
    "ENDPOINT_PORT",
    "MAIN_TEACHER",
    "PROBE_TOKENS",
    "SAMPLER_PORT",
    "TEACHER_PORT",
    "Choice",
    "CollapseConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "Dtype",
    "DtypeOrAuto",
    "Launch",
    "LayerRule",
    "LoraConfig",
    "Machine",
    "MixtureConfig",
    "ObjectiveConfig",
    "ObjectiveSection",
    "OptimConfig",
    "QuantizeConfig",
    "ReplayConfig",
    "RolloutConfig",
    "Settled",
    "StudentInit",
    "StudentWidth",
    "TeacherConfig",
    "advice",
    "advice_on_share",
    "cache_folder",
    "default_objective",
    "describe_keys",
    "dtypes_of",
    "exit_copy",
    "fastest_here",
    "instruction_limits",
    "known",
    "load_config",
    "lone_choices",
    "make_config",
    "make_section",
    "read_mapping",
    "served_choices",
    "settle",
    "settled_option",
    "settled_values",
]
