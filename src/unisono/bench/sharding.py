"""``unisono bench sharding``: a step of sharded state and of divided layers beside torch's own, on two workers."""

from collections.abc import Callable
from statistics import median
from typing import Any

from unisono.bench.sharded import LAYOUTS, WAYS, WORKERS, described
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

TORCHS = {"zero 3": "fully_shard", "tensor": "parallelize_module", "tensor, sequence": "parallelize_module"}


def bench(launcher: Launcher, rounds: int, say: Callable[[str], None] | None) -> dict[str, Any]:
    """Measure; a row for each way, of medians over interleaved rounds."""
    rows = []
    for way in LAYOUTS:
        seconds: dict[str, list[float]] = {by: [] for by in WAYS}
        for _ in range(rounds):
            for by in WAYS:
                target = {"call": "unisono.bench.sharded:measure", "arguments": {"by": by, "way": way}}
                seconds[by] += launcher.run(target, WORKERS, output=STANDARD_ERROR).results[0]
        found = {by: median(values) for by, values in seconds.items()}
        rows.append(
            {
                "way": way,
                "against": TORCHS[way],
                "seconds": {by: round(value, 4) for by, value in found.items()},
                "throughput_of_torch": round(found["torch"] / found["unisono"], 3),
            }
        )
        if say is not None:
            say(as_text(rows[-1]))
    return {**described(), "rows": rows}


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    return (
        f"{row['way']:<17} {row['seconds']['unisono']:.3f} s a step, {row['against']} over gloo "
        f"{row['seconds']['torch']:.3f} s: {row['throughput_of_torch']:.2f} of its throughput"
    )
