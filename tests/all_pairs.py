"""Layouts in which every two settings that can meet do: a greedy covering set.

Run as a program it writes configs/layouts.txt.
"""

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

from unisono.plan.schedule import SCHEDULES

MOST_WORKERS = 4
SETTINGS: dict[str, tuple[object, ...]] = {
    "data": (1, 2, 3, 4),
    "zero": (0, 1, 2, 3),
    "pipeline": (1, 2, 3, 4),
    "schedule": SCHEDULES,
    "recompute": ("none", "selective", "full"),
}
FILE = Path(__file__).parents[1] / "configs" / "layouts.txt"
HEAD = """\
# Layouts in which every two settings that can meet do: data 1-4, ZeRO 0-3, pipelines of 1-4 workers, all schedules,
# all recomputation; at most 4 workers each. Made by python -m tests.all_pairs.
#   unisono verify configs/lm.yaml --layouts configs/layouts.txt
"""

Layout = dict[str, object]


def layouts() -> Iterator[Layout]:
    """Every layout with few enough workers; without a pipeline there is one schedule."""
    for values in product(*SETTINGS.values()):
        layout = dict(zip(SETTINGS, values, strict=True))
        workers = int(str(layout["data"])) * int(str(layout["pipeline"]))
        if workers <= MOST_WORKERS and (layout["pipeline"] != 1 or layout["schedule"] == "1f1b"):
            yield layout


def pairs(layout: Layout) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """Every two of its settings."""
    return set(combinations(layout.items(), 2))


def covering() -> list[Layout]:
    """Few layouts that hold all pairs: each next one holds the most that are missing."""
    everything = list(layouts())
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda layout: len(pairs(layout) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def text() -> str:
    """The file."""
    lines = [" ".join(f"{key}={value}" for key, value in layout.items()) for layout in covering()]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
