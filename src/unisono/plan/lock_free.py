"""A step's units where workers update the state without locks: who has which, and how late each was, as words."""

from dataclasses import dataclass

import numpy as np

from unisono.plan.unit_pool import HEAD, PoolWords, UnitPool, words_by_name


@dataclass(frozen=True, slots=True)
class LockFreeLayout(PoolWords):
    """How a pool's words are divided.

    Attributes:
        workers: at the most.
        units: of a step.
    """

    workers: int
    units: int

    @property
    def sizes(self) -> dict[str, int]:
        """Words by name."""
        words = {"head": HEAD, "under way": self.workers, "clock": self.workers}
        return words | {"late": self.units, "sums": 2 * self.units}


class LockFreePool(UnitPool):
    """Units whose updates nobody orders.

    Attributes:
        clock: how many units each slot's worker has done in the step.
        sums: loss and weight of each unit, (units, 2).
    """

    def __init__(self, layout: LockFreeLayout, memory: memoryview) -> None:
        parts = words_by_name(memory, layout.sizes)
        super().__init__(layout.units, parts)
        self.clock, self._late = parts["clock"], parts["late"]
        self.sums = parts["sums"].view(np.float64).reshape(layout.units, 2)

    def begin(self, step: int) -> None:
        """Let it be that of ``step``."""
        self._head[1] = 0
        self.under_way[:], self.clock[:], self._late[:], self.sums[:] = 0, 0, 0, 0.0
        self._head[0] = step

    @property
    def pushes(self) -> int:
        """Units that are done in the step so far."""
        return int(self.clock.sum())

    def finish(self, unit: int, late: int) -> None:
        """A unit is done, during which ``late`` others were."""
        self._late[unit] = 1 + late

    def is_done(self, unit: int) -> bool:
        """Whether a unit's gradient is in the state."""
        return bool(self._late[unit])

    @property
    def progress(self) -> int:
        """Grows with every unit that is done."""
        return int(np.count_nonzero(self._late))

    def missing(self) -> list[int]:
        """Units that are not."""
        return [int(unit) for unit in np.flatnonzero(self._late == 0)]

    @property
    def all_done(self) -> bool:
        """Whether every unit's is."""
        return bool(self._late.all())

    def staleness(self) -> dict[int, int]:
        """How many units were computed while so many others were done."""
        late, counts = np.unique(self._late[self._late > 0] - 1, return_counts=True)
        return dict(zip(late.tolist(), counts.tolist(), strict=True))
