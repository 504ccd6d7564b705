"""What workers that wait for nobody take in turn, and the order in which servers take what they bring: as words.

A step is a pool of *units*, each a few micro-batches, whose gradient is *pushed* to every server. A server keeps some
of the model's runs, and counts its updates: its *version*. The order of a step is, for every server, whose pushes it
took one after another, and which versions of all servers their values were made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unisono.plan.unit_pool import HEAD, PoolWords, UnitPool, words_by_name

SPARE = 64
"""Entries of a server besides one for each unit: a push that a dying worker has begun takes two."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One push, as a server took it.

    Attributes:
        unit: which it was.
        worker: who pushed it: the slot of its host's, or where servers are spread, its rank.
        first, stop: of the server's runs, those that it changed: all, unless the worker died in the middle.
        read: the version of each server whose values the gradient was computed with.
    """

    unit: int
    worker: int
    first: int
    stop: int
    read: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """What the servers of one host, or of all, have taken in a step.

    Attributes:
        order: of each server, its entries; none of one that is elsewhere.
        base: the version of each as the step began.
        sums: loss and weight of each unit, (units, 2); 0 of one that was computed elsewhere.
    """

    order: Sequence[Sequence[Entry]]
    base: Sequence[int]
    sums: NDArray[np.float64]

    def as_lists(self) -> list[list[Any]]:
        """For a message."""
        order = [[[e.unit, e.worker, e.first, e.stop, *e.read] for e in entries] for entries in self.order]
        return [order, list(self.base), self.sums.tolist()]

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[Any]]) -> "Taken":
        """From a message."""
        order, base, sums = lists
        entries = [
            [Entry(unit, worker, first, stop, tuple(r)) for unit, worker, first, stop, *r in own] for own in order
        ]
        return cls(entries, base, np.array(sums, dtype=np.float64))

    def together(self, other: "Taken") -> "Taken":
        """This, and what the servers of other hosts have taken."""
        here = [bool(entries) for entries in self.order]
        order = [a if has else b for has, a, b in zip(here, self.order, other.order, strict=True)]
        base = [a if has else b for has, a, b in zip(here, self.base, other.base, strict=True)]
        return Taken(order, base, self.sums + other.sums)


@dataclass(frozen=True, slots=True)
class PoolLayout(PoolWords):
    """How a pool's words are divided.

    Attributes:
        workers: at the most.
        units: of a step.
        runs: of each server; 0 of one that is on another host.
        rows: of all tables together.
    """

    workers: int
    units: int
    runs: tuple[int, ...]
    rows: int = 0

    @property
    def servers(self) -> int:
        """How many there are."""
        return len(self.runs)

    @property
    def entry_words(self) -> int:
        """Words of an entry."""
        return 4 + self.servers

    @property
    def sizes(self) -> dict[str, int]:
        """Words by name."""
        return {
            "head": HEAD,
            "under way": self.workers,
            "clock": self.workers,
            "version": self.servers,
            "base": self.servers,
            "busy": self.servers,
            "done": self.units * self.servers,
            "sums": 2 * self.units,
            "order": self.servers * (self.units + SPARE) * self.entry_words,
            "changed": self.rows,
        }


class Pool(UnitPool):
    """Units that servers take in an order, which is kept. Methods that name a server are called under its lock.

    Attributes:
        clock: how many units each worker has done in the step.
        version: of each server.
        done: how many runs of each server a unit has changed, (units, servers).
        sums: loss and weight of each unit, (units, 2).
        changed: the version of its server since which each row of a table is as it is.
    """

    def __init__(self, layout: PoolLayout, memory: memoryview) -> None:
        parts = words_by_name(memory, layout.sizes)
        super().__init__(layout.units, parts)
        self.layout, self.clock, self._runs = layout, parts["clock"], np.array(layout.runs)
        self.version, self._base, self._busy = parts["version"], parts["base"], parts["busy"]
        self.done = parts["done"].reshape(layout.units, layout.servers)
        self.sums = parts["sums"].view(np.float64).reshape(layout.units, 2)
        self.changed = parts["changed"]
        self._order = parts["order"].reshape(layout.servers, layout.units + SPARE, layout.entry_words)

    @property
    def base(self) -> Sequence[int]:
        """The version of each server as the step began."""
        return [int(version) for version in self._base]

    def begin(self, step: int, versions: Sequence[int]) -> None:
        """Let it be that of ``step``.

        Arguments:
            versions: of all servers.
        """
        self._head[1] = 0
        self.version[:] = versions
        self.under_way[:], self.clock[:], self._busy[:] = 0, 0, 0
        self.done[:], self.sums[:] = 0, 0.0
        self._base[:] = self.version
        self._head[0] = step

    def is_done(self, unit: int) -> bool:
        """Whether every server has all of a unit."""
        return bool((self.done[unit] == self._runs).all())

    @property
    def all_done(self) -> bool:
        """Whether every server has all of every unit, and nobody is about to say so of the last."""
        return bool((self.done == self._runs).all()) and not self._busy.any()

    @property
    def progress(self) -> int:
        """Grows with every push that a server here has taken."""
        return int(self.version.sum())

    def missing(self) -> list[int]:
        """Units of which servers here have not all."""
        return [int(unit) for unit in np.flatnonzero((self.done != self._runs).any(axis=1))]

    def staleness(self) -> dict[int, int]:
        """How many pushes in the step so far were so late (see `staleness`)."""
        return staleness(self.order(), self.base)

    def open_entry(self, server: int, entry: Entry) -> None:
        """A push begins."""
        number = self.version[server] - self._base[server]
        self._order[server, number] = (entry.unit, entry.worker, entry.first, entry.stop, *entry.read)
        self._busy[server] = 1 + number

    def opened(self, server: int) -> Entry | None:
        """The push that somebody began and died in; None for none."""
        number = int(self.version[server] - self._base[server])
        if self._busy[server] != 1 + number:  # none, or one that is over, but for the last word of it
            self._busy[server] = 0
            return None
        return self._entry(server, number)

    def shorten(self, server: int, stop: int) -> None:
        """The push that somebody died in has changed runs up to ``stop``."""
        self._order[server, self.version[server] - self._base[server], 3] = stop

    def close_entry(self, server: int, entry: Entry, stop: int) -> None:
        """A push is over, having changed runs up to ``stop``: none where that is its first."""
        if stop > entry.first:
            words = self._order[server, self.version[server] - self._base[server]]
            words[3] = stop
            self.done[entry.unit, server] = stop
            self.version[server] += 1
        self._busy[server] = 0

    def order(self) -> list[list[Entry]]:
        """The entries of every server in the step so far."""
        counts = self.version - self._base
        return [[self._entry(server, i) for i in range(int(counts[server]))] for server in range(self.layout.servers)]

    def taken(self) -> Taken:
        """What the servers here have taken in the step so far."""
        return Taken(self.order(), self.base, self.sums.copy())

    def _entry(self, server: int, number: int) -> Entry:
        unit, worker, first, stop, *read = map(int, self._order[server, number])
        return Entry(unit, worker, first, stop, tuple(read))


def staleness(order: Sequence[Sequence[Entry]], base: Sequence[int]) -> dict[int, int]:
    """How many pushes were computed with values that so many updates of their server had made old since.

    Arguments:
        base: each server's version as the step began.

    >>> staleness([[Entry(0, 0, 0, 1, (5,)), Entry(1, 1, 0, 1, (5,))]], [5])
    {0: 1, 1: 1}
    """
    found: dict[int, int] = {}
    for server, entries in enumerate(order):
        for number, entry in enumerate(entries):
            late = base[server] + number - entry.read[server]
            found[late] = found.get(late, 0) + 1
    return dict(sorted(found.items()))


def may_begin(clocks: Sequence[int], mine: int, bound: int | None) -> bool:
    """Whether a worker may begin a further unit: it has done no more than ``bound`` above the one that has done least.

    Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013.

    Arguments:
        clocks: units that each worker has done, this one's among them.

    >>> may_begin([3, 1, 2], mine=3, bound=2), may_begin([4, 1, 2], mine=4, bound=2)
    (True, False)
    """
    return bound is None or mine <= min(clocks) + bound
