"""Which observers a run has."""

from pathlib import Path

from unisono.config import ObserveConfig
from unisono.observe.observer import Observer
from unisono.observe.progress import Progress
from unisono.observe.records import EVENTS, EventLog, TensorBoard
from unisono.observe.report import ReportWriter


def observers(config: ObserveConfig, run_dir: Path | None) -> list[Observer]:
    """The observers that a configuration asks for; records need a run directory."""
    chosen: list[Observer] = []
    if run_dir is not None:
        chosen.append(EventLog(run_dir / EVENTS))
        if config.tensorboard:
            chosen.append(TensorBoard(run_dir / "tensorboard", config.log_every))
        if config.report:
            chosen.append(ReportWriter(run_dir))
    if config.progress:
        chosen.append(Progress())
    return chosen
