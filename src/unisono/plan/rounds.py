"""Rounds in which the first gradients that come count, as words of shared memory: nobody late holds up a round.

Chen et al., "Revisiting distributed synchronous SGD", 2016.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unisono.plan.unit_pool import HEAD, PoolWords, UnitPool, words_by_name


@dataclass(frozen=True, slots=True)
class Arrival:
    """A unit whose gradient counts in a round.

    Attributes:
        unit: which it is.
        slot: of the worker that holds its gradient.
        entry: the worker's buffer in which it does.
    """

    unit: int
    slot: int
    entry: int


@dataclass(frozen=True, slots=True)
class RoundsLayout(PoolWords):
    """How the words of a pool are divided whose units are taken round by round.

    Attributes:
        workers: at the most.
        units: of a step.
        servers: how many there are.
        accepted: units of a round that count.
        backup: further ones that workers compute at the same time.
    """

    workers: int
    units: int
    servers: int
    accepted: int
    backup: int

    @property
    def rounds(self) -> int:
        """Of a step; in the last one, fewer units may count."""
        return -(-self.units // self.accepted)

    @property
    def sizes(self) -> dict[str, int]:
        """Words by name."""
        arrivals = 3 * self.rounds * self.accepted
        words = {"head": HEAD, "under way": self.workers, "base": self.servers, "busy": self.servers}
        return words | {"count": self.rounds, "arrivals": arrivals, "sums": 2 * self.rounds}


class RoundsPool(UnitPool):
    """A step's units, of which the first that come count in each round; what comes late is computed again.

    Every unit counts once.

    Attributes:
        busy: of each server, the slot plus 1 of the worker that updates it, or died in that; under the server's lock.
        sums: loss and weight of each round, (rounds, 2).
    """

    def __init__(self, layout: RoundsLayout, memory: memoryview) -> None:
        parts = words_by_name(memory, layout.sizes)
        super().__init__(layout.units, parts)
        self.layout, self._base, self._count, self.busy = layout, parts["base"], parts["count"], parts["busy"]
        self._arrivals = parts["arrivals"].reshape(layout.rounds, layout.accepted, 3)
        self.sums = parts["sums"].view(np.float64).reshape(layout.rounds, 2)

    def begin(self, step: int, versions: Sequence[int]) -> None:
        """Let it be that of ``step``; ``versions`` are those of the servers."""
        self._head[1] = self._head[3] = 0
        self.under_way[:], self.busy[:], self._count[:], self.sums[:] = 0, 0, 0, 0.0
        self._base[:] = versions
        self._head[0] = step

    @property
    def round(self) -> int:
        """The one that is under way, from 0; their number, once all are over."""
        return int(self._head[3])

    def needed(self, number: int) -> int:
        """How many units count in a round."""
        return min(self.layout.accepted, self.layout.units - number * self.layout.accepted)

    def is_closed(self, number: int) -> bool:
        """Whether as many have come as count."""
        return bool(self._count[number] >= self.needed(number))

    def arrivals(self, number: int) -> list[Arrival]:
        """Those of a round, in order of unit."""
        found = (Arrival(*map(int, words)) for words in self._arrivals[number, : self._count[number]])
        return sorted(found, key=lambda arrival: arrival.unit)

    @property
    def members(self) -> list[list[int]]:
        """The units that count in each round, in order."""
        return [[arrival.unit for arrival in self.arrivals(number)] for number in range(self.layout.rounds)]

    @property
    def totals(self) -> list[tuple[float, float]]:
        """Loss and weight of each round."""
        return [(float(loss), float(weight)) for loss, weight in self.sums]

    def version(self, server: int, number: int) -> int:
        """Where a server is as a round begins."""
        return int(self._base[server]) + number

    @property
    def may_take(self) -> bool:
        """Whether fewer units than are wanted have come, or are under way."""
        number = self.round
        if number >= self.layout.rounds or self.exhausted:
            return False
        under_way = np.count_nonzero(self.under_way)
        return bool(self._count[number] + under_way < self.needed(number) + self.layout.backup)

    def is_done(self, unit: int) -> bool:
        """Whether a unit has come and counts."""
        come = np.arange(self.layout.accepted) < self._count[:, None]
        return bool(((self._arrivals[:, :, 0] == unit) & come).any())

    def arrive(self, number: int, arrival: Arrival) -> bool:
        """A unit comes that was computed in a round; whether it counts: else it is to be computed again."""
        if self.is_done(arrival.unit):  # from another, who was lost
            self.under_way[arrival.slot] = 0
            return True
        if self.round != number or self.is_closed(number):
            return False
        self._arrivals[number, self._count[number]] = (arrival.unit, arrival.slot, arrival.entry)
        self._count[number] += 1
        self.under_way[arrival.slot] = 0
        return True

    def end(self, number: int, loss: float, weight: float) -> None:
        """A round is over: every server has it."""
        if self.round == number:
            self.sums[number] = loss, weight
            self._head[3] = number + 1
