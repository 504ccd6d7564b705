"""``unisono bench survival``: what it costs to be able to go on when a worker is lost, and to write checkpoints."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from unisono.bench.variants import PeakMemory, seconds_of_steps
from unisono.config import CheckpointConfig
from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR
from unisono.state.interval import best_interval_s

WORKERS, MICRO_BATCHES, WARMUP = 2, 4, 5
STEPS = {"lm": 40, "small": 40, "large": 10}
MICRO_BATCH = {"lm": 8, "small": 2, "large": 2}
EVERY = 10
VARIANTS: dict[str, dict[str, Any]] = {
    "unprotected": {"fault": {"on_loss": "stop", "copies": "never"}},
    "protected": {},
    "checkpoints": {"checkpoint": {"every": EVERY}},
}


def bench(
    launcher: Launcher, models: Sequence[str], rounds: int, say: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """Measure, interleaved; one row for each model.

    Raises:
        ConfigurationError: for a model that is not known.
    """
    if unknown := [model for model in models if model not in STEPS]:
        raise ConfigurationError(f"--models {unknown[0]!r} is not known; use {', '.join(STEPS)}")
    rows = []
    for model in models:
        rows.append(_row(launcher, model, rounds))
        if say is not None:
            say(as_text(rows[-1]))
    return rows


def _row(launcher: Launcher, model: str, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}  # a run's median step
    whole: dict[str, list[float]] = {variant: [] for variant in VARIANTS}  # its mean one, which pays for checkpoints
    memory: dict[str, int] = {}
    for number in range(rounds + 1):  # memory first: to look at it takes time
        for variant in VARIANTS:
            arguments = {"variant": variant, "shape": model, "steps": STEPS[model], "memory": number == 0}
            target = {"call": "unisono.bench.survival:measure", "arguments": arguments}
            results = launcher.run(target, WORKERS, output=STANDARD_ERROR).results
            if number == 0:
                memory[variant] = sum(result["peak_bytes"] for result in results)
            else:
                seconds[variant].append(median(results[0]["step_s"]))
                whole[variant].append(mean(results[0]["step_s"]))
    step_s = {variant: median(times) for variant, times in seconds.items()}
    mean_s = {variant: median(times) for variant, times in whole.items()}
    checkpoint_s = max(0.0, EVERY * (mean_s["checkpoints"] - mean_s["protected"]))
    interval_s = best_interval_s(checkpoint_s, 3600 * CheckpointConfig().mtbf_h) if checkpoint_s else None
    return {
        "model": model,
        "rounds": rounds,
        "step_s": {variant: round(value, 5) for variant, value in step_s.items()},
        "protection": round(step_s["protected"] / step_s["unprotected"] - 1, 4),
        "protection_by_round": [
            round(a / b - 1, 4) for a, b in zip(seconds["protected"], seconds["unprotected"], strict=True)
        ],
        "checkpoints_every_10": round(mean_s["checkpoints"] / mean_s["protected"] - 1, 4),
        "checkpoint_s": round(checkpoint_s, 4),
        "interval_s": None if interval_s is None else round(interval_s, 1),
        "checkpoints_at_interval": 0.0 if interval_s is None else round(checkpoint_s / interval_s, 5),
        "peak_bytes": memory,
    }


def measure(variant: str, shape: str, steps: int, memory: bool) -> dict[str, Any]:
    """In a worker: what its steps take, and its peak of memory."""
    with tempfile.TemporaryDirectory(prefix="unisono-bench-") as directory, PeakMemory(on=memory) as peak:
        settings = dict(VARIANTS[variant])
        if "checkpoint" in settings:
            settings["run_dir"] = directory  # rank 0's, which writes them
        seconds = seconds_of_steps(
            shape,
            steps,
            WARMUP,
            global_batch_size=MICRO_BATCH[shape] * MICRO_BATCHES,
            micro_batch_size=MICRO_BATCH[shape],
            **settings,
        )
    return {"step_s": seconds, "peak_bytes": peak.peak_bytes}


def as_text(row: Mapping[str, Any]) -> str:
    """A row for a reader."""
    steps, memory = row["step_s"], row["peak_bytes"]
    interval = f", {row['interval_s']:.0f} s apart {row['checkpoints_at_interval']:.2%}" if row["interval_s"] else ""
    return (
        f"{row['model']}: {1000 * steps['unprotected']:.1f} ms a step unprotected, {1000 * steps['protected']:.1f} ms "
        f"protected ({row['protection']:+.1%}; by round {', '.join(f'{v:+.1%}' for v in row['protection_by_round'])})\n"
        f"  a checkpoint costs {row['checkpoint_s']:.3f} s of training: every {EVERY} steps "
        f"{row['checkpoints_every_10']:+.1%}{interval}\n"
        f"  memory of all workers, MB: {', '.join(f'{name} {size / 1e6:.0f}' for name, size in memory.items())}"
    )
