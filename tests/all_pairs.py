"""Layouts in which every two settings that can meet do: a greedy covering set.

Run as a program it writes configs/layouts.txt; with ``--all`` it prints every layout, those of up to 16 workers too.
"""

import sys
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


def layouts(most_workers: int = MOST_WORKERS) -> Iterator[Layout]:
    """Every layout with few enough workers; without a pipeline there is one schedule."""
    for values in product(*SETTINGS.values()):
        layout = dict(zip(SETTINGS, values, strict=True))
        workers = int(str(layout["data"])) * int(str(layout["pipeline"]))
        if workers <= most_workers and (layout["pipeline"] != 1 or layout["schedule"] == "1f1b"):
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
    return HEAD + "\n".join(map(line, covering())) + "\n"


def line(layout: Layout) -> str:
    """A layout as a line of a file."""
    return " ".join(f"{key}={value}" for key, value in layout.items())


if __name__ == "__main__":
    if "--all" in sys.argv:
        print("\n".join(map(line, layouts(16))))
    else:
        FILE.write_text(text(), encoding="utf-8")
