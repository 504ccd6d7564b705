"""The typed configuration: read from YAML, overridden by ``key=value`` words, validated once, unknown keys refused.

No torch here: the command line checks a configuration before anything heavy is imported.
"""

from unisono.config.models import (
    CheckpointConfig,
    ClipConfig,
    Config,
    FaultConfig,
    Layout,
    ObserveConfig,
    OptimizerConfig,
    ScalingConfig,
    Schedule,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    WireConfig,
    more_replicas_than_micro_batches,
)
from unisono.config.reading import load, reference, to_yaml, validate
from unisono.config.section import Section
from unisono.config.sync import OuterConfig, SyncConfig

__all__ = [
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "FaultConfig",
    "Layout",
    "ObserveConfig",
    "OptimizerConfig",
    "OuterConfig",
    "ScalingConfig",
    "Schedule",
    "ScheduleConfig",
    "Section",
    "SyncConfig",
    "TrainingConfig",
    "ValidationConfig",
    "WireConfig",
    "load",
    "more_replicas_than_micro_batches",
    "reference",
    "to_yaml",
    "validate",
]
