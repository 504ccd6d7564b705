"""``unisono bench train``: a training step of Unisono beside what one would use instead, interleaved in one run."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from unisono.bench.variants import available
from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

WORKERS = 2
MICRO_BATCHES = {"small": (1, 2, 4), "large": (1,)}
STEPS = {"small": 24, "large": 8}
WARMUP = 4


def bench(
    launcher: Launcher,
    models: Sequence[str],
    against: Sequence[str] | None,
    rounds: int,
    say: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """Measure; one row for each model and micro-batch.

    Raises:
        ConfigurationError: for a model, or another way of training, that is not known or not installed.
    """
    names = available()
    for name in against or ():
        if name not in names:
            raise ConfigurationError(f"--against {name!r} is not known, or not installed; use {', '.join(names)}")
    if against is not None:
        names = [name for name in names if name in (*against, "unisono")]
    for model in models:
        if model not in STEPS:
            raise ConfigurationError(f"--models {model!r} is not known; use {', '.join(STEPS)}")
    rows = []
    for model in models:
        for micro_batch in MICRO_BATCHES[model]:
            rows.append(_row(launcher, model, names, micro_batch, rounds))
            if say is not None:
                say(as_text(rows[-1:]))
    return rows


def _row(launcher: Launcher, model: str, names: Sequence[str], micro_batch: int, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = {}
    for round_number in range(rounds + 1):
        for name in names:
            sampling = round_number == 0
            arguments = {
                "variant": name,
                "shape": model,
                "micro_batch": micro_batch,
                "steps": STEPS[model],
                "warmup": WARMUP,
                "memory": sampling,
            }
            target = {"call": "unisono.bench.variants:measure", "arguments": arguments}
            results = launcher.run(target, WORKERS, output=STANDARD_ERROR).results
            if sampling:
                memory[name] = sum(result["peak_bytes"] for result in results)
            else:  # the step of a set of workers is its slowest worker's
                seconds[name].append(max(median(result["step_s"]) for result in results if result["step_s"]))
    ours = median(seconds["unisono"])
    row: dict[str, Any] = {"model": model, "micro_batch": micro_batch, "workers": WORKERS, "rounds": rounds}
    row["step_s"] = {name: median(values) for name, values in seconds.items()}
    row["peak_bytes"] = memory
    for name in names:
        if name != "unisono":
            row[f"unisono_vs_{name}"] = round(median(seconds[name]) / ours, 3)
    return row


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader: milliseconds a step, and throughput of Unisono against each."""
    lines = []
    for row in rows:
        lines.append(f"{row['model']}, micro-batch {row['micro_batch']}, {row['workers']} workers:")
        for name, seconds in row["step_s"].items():
            ratio = row.get(f"unisono_vs_{name}")
            against = f"   unisono is {ratio:.2f}x" if ratio is not None else ""
            peak = row["peak_bytes"][name] / 2**20
            lines.append(f"  {name:<12} {seconds * 1e3:8.2f} ms a step  {peak:7.0f} MiB{against}")
    return "\n".join(lines)
