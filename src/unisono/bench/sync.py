"""``unisono bench sync``: ways of agreeing beside each other, on tasks that learn, and where one worker is slow."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median
from typing import Any

from unisono.bench import learned, paced
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

SLEEP = "sleep"
TASKS = (SLEEP, *learned.TASKS)


def ways_of(task: str, begins: Sequence[str]) -> list[str]:
    """The ways of a task whose names begin so."""
    ways: Iterable[str] = paced.WAYS if task == SLEEP else learned.TASKS[task][1]
    return [way for way in ways if any(way.startswith(start) for start in begins)]


def bench(
    launcher: Launcher, task: str, ways: Sequence[str], rounds: int, say: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """Measure; a row for each way, and for each kind of slow worker: means and medians over interleaved rounds.

    Arguments:
        rounds: where something is learned, each has a seed of its own.
    """
    rows = []
    for slow in paced.SLOW if task == SLEEP else ("none",):
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways:
                found[way].append(_measured(launcher, task, way, slow, number))
        for way, runs in found.items():
            row = {"mode": way, "task": task, "slow_worker": slow} | _summary(runs)
            rows.append(row)
            if say is not None:
                say(as_text(row))
    return rows


def _measured(launcher: Launcher, task: str, way: str, slow: str, seed: int) -> dict[str, Any]:
    if task == SLEEP:
        target = {"call": "unisono.bench.paced:measure", "arguments": {"way": way, "slow": slow}}
        workers = paced.WORKERS
    elif way == learned.TORCHS:
        arguments = {"task": task, "workers": learned.workers_of(task, way), "seed": seed}
        target, workers = {"call": "unisono.bench.shared:measure", "arguments": arguments}, 1  # which starts the others
    else:
        target = {"call": "unisono.bench.learned:measure", "arguments": {"task": task, "way": way, "seed": seed}}
        workers = learned.workers_of(task, way)
    found: dict[str, Any] = launcher.run(target, workers, output=STANDARD_ERROR).results[0]
    return found


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several runs."""
    accuracies = [run["accuracy"] for run in runs if "accuracy" in run]
    return {
        "accuracy": round(mean(accuracies), 4) if accuracies else None,
        "accuracies": [round(value, 4) for value in accuracies],
        "loss": mean(run["loss"] for run in runs),
        "bytes": runs[0].get("bytes"),
        "wall_s": round(median(run["wall_s"] for run in runs), 3),
        "samples_per_s": round(median(run["samples_per_s"] for run in runs), 1),
        "staleness_max": max((run["staleness_max"] for run in runs if run["staleness_max"] is not None), default=None),
    }


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    slow = f", slow worker: {row['slow_worker']}" if row["task"] == SLEEP else ""
    figures = [f"{row['samples_per_s']:8.1f} samples a second"]
    if row["accuracy"] is not None:
        ends = f" ({100 * min(row['accuracies']):.1f} to {100 * max(row['accuracies']):.1f})"
        figures = [f"accuracy {100 * row['accuracy']:.2f}%{ends}", f"loss {row['loss']:.4f}", *figures]
    if row["bytes"]:
        figures.append(f"{row['bytes'] / 1e6:.1f} MB told")
    if row["staleness_max"] is not None:
        figures.append(f"staleness at most {row['staleness_max']}")
    return f"{row['task']}{slow}  {row['mode']:<28} {', '.join(figures)}"
