"""Unisono: distributed PyTorch training that gives the same bits on any number of workers."""

from typing import TYPE_CHECKING

from unisono.comm.registration import register_with_torch

if TYPE_CHECKING:
    from unisono.config import Layout, ScalingConfig, ScheduleConfig
    from unisono.data.clients import Clients
    from unisono.errors import UnisonoError
    from unisono.predictions import read_predictions
    from unisono.trainer import Predicted, Result, Trainer

__version__ = "0.1.0"
__all__ = [
    "Clients",
    "Layout",
    "Predicted",
    "Result",
    "ScalingConfig",
    "ScheduleConfig",
    "Trainer",
    "UnisonoError",
    "__version__",
    "read_predictions",
]

_ROOMS = {
    "Clients": "unisono.data.clients",
    "Layout": "unisono.config",
    "Predicted": "unisono.trainer",
    "Result": "unisono.trainer",
    "ScalingConfig": "unisono.config",
    "ScheduleConfig": "unisono.config",
    "Trainer": "unisono.trainer",
    "UnisonoError": "unisono.errors",
    "read_predictions": "unisono.predictions",
}


register_with_torch()


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: the command line's help does not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)
