"""The one configuration model: every field with its meaning, unit and bounds.

`load_config("quickstart", ["run.seed=1"])` reads a packaged config by name or any YAML file by path, applies
`key.path=value` overrides and validates. Bad input raises ConfigError with one line: field, found, allowed.
"""

from .block import FOLDER_NAME, GROUPS, PACKAGE, Block, ConfigError, Whole, first_line
from .evaluation import LatentsConfig
from .flat import FLAT_KINDS, BatchTopKConfig, FlatConfig, JumpReLUConfig, MatryoshkaConfig, TopKConfig
from .hsae import HSAEConfig
from .load import apply_override, dump_yaml, find_config, load_config, put
from .places import local_paths, located
from .run import ArmConfig, Config
from .sources import ENDINGS, PACKAGED, ConceptsConfig, CorpusConfig, RunConfig
from .training import LossOverrides, StageConfig, TeacherConfig, TrainingConfig

__all__ = [
    "ENDINGS",
    "FLAT_KINDS",
    "FOLDER_NAME",
    "GROUPS",
    "PACKAGE",
    "PACKAGED",
    "ArmConfig",
    "BatchTopKConfig",
    "Block",
    "ConceptsConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "FlatConfig",
    "HSAEConfig",
    "JumpReLUConfig",
    "LatentsConfig",
    "LossOverrides",
    "MatryoshkaConfig",
    "RunConfig",
    "StageConfig",
    "TeacherConfig",
    "TopKConfig",
    "TrainingConfig",
    "Whole",
    "apply_override",
    "dump_yaml",
    "find_config",
    "first_line",
    "load_config",
    "local_paths",
    "located",
    "put",
]
