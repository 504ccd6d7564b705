"""A run of ours beside what is predicted of it: a step's seconds, from its records and a few steps measured here."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from unisono.check.choosing import Prospect, prospect, refuse_what_is_not_measured, sound
from unisono.config import load
from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher
from unisono.observe.records import EVENTS

FEWEST = 3
"""Steps that are compared; the first one is not."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run and its prediction.

    Attributes:
        steps: of which it has records.
        measured_s: the median of its steps.
        phases: seconds of a step, of the worker that takes longest, by phase.
    """

    run_dir: Path
    predicted: Prospect
    steps: int
    measured_s: float
    phases: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "run_dir": str(self.run_dir),
            "predicted": self.predicted.as_dict(),
            "steps": self.steps,
            "measured_s": self.measured_s,
            "ratio": self.predicted.step_s / self.measured_s,
            "phases": self.phases,
        }

    def as_text(self) -> str:
        """For a reader."""
        longest = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in self.phases.items())
        ratio = self.predicted.step_s / self.measured_s
        return (
            f"predicted {self.predicted.as_text().strip()}\n"
            f"measured  {1000 * self.measured_s:.1f} ms, the median of {self.steps} steps in {self.run_dir} "
            f"({longest} ms)\n"
            f"the prediction is {ratio:.2f} of what was measured"
        )


def compare(launcher: Launcher, run_dir: Path) -> Comparison:
    """Predict a run's layout, from a few steps of its configuration here, and look up what it took.

    Raises:
        ConfigurationError: where the directory holds no run, or too few steps.
    """
    steps = _steps(run_dir)
    workers = len(steps[-1]["phases"])
    config = load(run_dir / "config.yaml")
    refuse_what_is_not_measured(config)
    layout = config.layout.model_copy(update={"data": workers // config.layout.model_workers})
    predicted = prospect(config, layout, sound(launcher, config, [layout]), workers)
    names = steps[-1]["phases"][0]
    phases = {name: median(max(worker.get(name, 0.0) for worker in one["phases"]) for one in steps) for name in names}
    return Comparison(run_dir, predicted, len(steps), median(one["seconds"] for one in steps), phases)


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    """Records of steps, without the first."""
    try:
        lines = (run_dir / EVENTS).read_text(encoding="utf-8").splitlines()
        found = [event for event in map(json.loads, lines) if "phases" in event and "loss" in event]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{run_dir} holds no records of a run: {error}; give a run's directory") from error
    if len(found) <= FEWEST:
        raise ConfigurationError(f"{run_dir} has records of {len(found)} steps; {FEWEST + 1} are needed")
    return found[1:]
