"""Progress, records and reports: all of them only listen to events."""

from pathlib import Path

from unisono.config import ObserveConfig
from unisono.observe.observer import Observer


def observers(config: ObserveConfig, run_dir: Path | None, steps: int) -> list[Observer]:
    """The observers that a configuration asks for."""
    return []
