"""What all pools of a step's units have in common, as words of shared memory: who takes which unit."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]
HEAD = 4
"""Words of a pool's head: step, next unit, step before which the state was last copied, round."""


def words_by_name(memory: memoryview, sizes: Mapping[str, int]) -> dict[str, Words]:
    """Words by name."""
    words: Words = np.frombuffer(memory, dtype=np.int64)
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = words[start : start + size]
        start += size
    return parts


class PoolWords(ABC):
    """How a pool's words are divided."""

    __slots__ = ()

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Words by name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all."""
        return 8 * sum(self.sizes.values())


class UnitPool(ABC):
    """A step's units, each a few micro-batches, which workers take one after another.

    Methods that change something are called under the pool's lock. Words are written in an order in which a worker
    that dies between any two leaves what the next can go on with.

    Arguments:
        units: of a step.
        parts: words by name, "head" and "under way" among them.

    Attributes:
        under_way: the unit that each worker computes, plus 1; 0 for none.
    """

    def __init__(self, units: int, parts: Mapping[str, Words]) -> None:
        self._units = units
        self._head = parts["head"]
        self.under_way = parts["under way"]

    @property
    def snapshot(self) -> int:
        """The step before which the state was last copied."""
        return int(self._head[2])

    @snapshot.setter
    def snapshot(self, step: int) -> None:
        self._head[2] = step

    def is_of(self, step: int) -> bool:
        """Whether another worker has begun the step."""
        return bool(self._head[0] == step)

    def take(self, worker: int) -> int | None:
        """The next unit; None where there is no more."""
        unit = int(self._head[1])
        if unit >= self._units:
            return None
        self.under_way[worker] = unit + 1
        self._head[1] = unit + 1
        return unit

    @property
    def exhausted(self) -> bool:
        """Whether all units have been taken."""
        return bool(self._head[1] >= self._units)

    @abstractmethod
    def is_done(self, unit: int) -> bool:
        """Whether a unit counts already."""

    def inherit(self, worker: int, lost: int) -> int | None:
        """The unit that a lost worker has left undone, which is this one's now; None for none.

        Where it died as it took one, that is still to be had, and another may have taken it since.
        """
        unit = int(self.under_way[lost]) - 1
        if unit < 0:
            return None
        others = np.count_nonzero(self.under_way == unit + 1) > 1
        if others or self.is_done(unit):
            self.under_way[lost] = 0
            return None
        self._head[1] = max(int(self._head[1]), unit + 1)
        self.under_way[worker], self.under_way[lost] = unit + 1, 0
        return unit
