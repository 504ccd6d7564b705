"""``unisono bench sync``: ways of agreeing beside each other, where workers are equal and where one is slow."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from unisono.bench.paced import SLOW, WORKERS
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR


def bench(
    launcher: Launcher, ways: Sequence[str], rounds: int, say: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """Measure; a row for each way and each kind of slow worker, of medians over interleaved rounds."""
    rows = []
    for slow in SLOW:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                target = {"call": "unisono.bench.paced:measure", "arguments": {"way": way, "slow": slow}}
                found[way].append(launcher.run(target, WORKERS, output=STANDARD_ERROR).results[0])
        for way, runs in found.items():
            row = {
                "mode": way,
                "task": "sleep",
                "slow_worker": slow,
                "samples_per_s": round(median(run["samples_per_s"] for run in runs), 1),
                "wall_s": round(median(run["wall_s"] for run in runs), 3),
                "loss": median(run["loss"] for run in runs),
                "staleness_max": max(run["staleness_max"] for run in runs),
            }
            rows.append(row)
            if say is not None:
                say(as_text(row))
    return rows


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    return (
        f"slow worker: {row['slow_worker']:<6}  {row['mode']:<26} {row['samples_per_s']:7.1f} samples a second, "
        f"staleness at most {row['staleness_max']}"
    )
