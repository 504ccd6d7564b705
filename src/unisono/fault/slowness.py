"""Workers that stay slower than the others: found from the phases that all report, step by step."""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

STEPS = 30
SLOWER = 1.5
"""Times the others' median that a worker's phase takes, in most of the last `STEPS`, to be told of."""
MEANINGS = {"data": "loading data", "compute": "computing", "reduce": "summing gradients", "update": "updating"}


class Slowness:
    """Follows how long workers take for a micro-batch's work, phase by phase."""

    def __init__(self) -> None:
        self._slow: dict[tuple[int, str], deque[float]] = {}
        self._told: set[tuple[int, str]] = set()

    def look(self, phases: Mapping[int, Mapping[str, float]], work: Mapping[int, int]) -> list[str]:
        """A sentence for each worker that has become slow; once.

        Arguments:
            phases: seconds in each phase, by rank.
            work: micro-batches that each has computed.
        """
        said: list[str] = []
        for phase, meaning in MEANINGS.items():
            each = {r: row[phase] / max(1, work.get(r, 1)) for r, row in phases.items() if work.get(r, 1)}
            step_s = max((sum(row.values()) for row in phases.values()), default=0.0)
            for rank, seconds in each.items():
                others = [value for other, value in each.items() if other != rank]
                if len(others) < 1:
                    continue
                median = statistics.median(others)
                matters = seconds * max(1, work.get(rank, 1)) > 0.1 * step_s
                factor = seconds / median if median > 0 and matters else 1.0
                said += self._note(rank, phase, meaning, factor)
        return said

    def _note(self, rank: int, phase: str, meaning: str, factor: float) -> Sequence[str]:
        recent = self._slow.setdefault((rank, phase), deque(maxlen=STEPS))
        recent.append(factor)
        if (rank, phase) in self._told or len(recent) < STEPS:
            return ()
        typical = statistics.median(recent)
        if typical < SLOWER:
            return ()
        self._told.add((rank, phase))
        return (f"worker {rank} stays slow at {meaning}: {typical:.1f} times what the others take for the same work",)
