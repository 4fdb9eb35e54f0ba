"""The dataclasses of a checked recipe, and the declarations of the keys that set their fields.

The dataclasses are frozen and contain plain values only. Every shorthand is expanded, and every default is filled in.
Code that uses them does not need YAML, Hydra or OmegaConf.
"""

from kdbench.config.schema.data import SourceConfig
from kdbench.config.schema.keys import Key, declared_keys
from kdbench.config.schema.parts import NO_LOCATION, OperandConfig, PartConfig, PartWithOperands
from kdbench.config.schema.recipe import CompileMode, FrozenForwardMode, Notes, Published, Recipe
from kdbench.config.schema.roles import RoleConfig, WeightsConfig
from kdbench.config.schema.stage import Precision, StageConfig
from kdbench.config.schema.terms import EdgeConfig, TermConfig
from kdbench.config.schema.updates import ArtifactConfig, InnerStepConfig, OptimizerConfig, UpdateConfig

__all__ = [
    "NO_LOCATION",
    "ArtifactConfig",
    "CompileMode",
    "EdgeConfig",
    "FrozenForwardMode",
    "InnerStepConfig",
    "Key",
    "Notes",
    "OperandConfig",
    "OptimizerConfig",
    "PartConfig",
    "PartWithOperands",
    "Precision",
    "Published",
    "Recipe",
    "RoleConfig",
    "SourceConfig",
    "StageConfig",
    "TermConfig",
    "UpdateConfig",
    "WeightsConfig",
    "declared_keys",
]
