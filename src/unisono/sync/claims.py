"""Which units count in each round, for workers of several hosts: decided by one pool, before their gradients travel."""

from collections.abc import Callable
from typing import Protocol

from unisono.comm.calls import Asks
from unisono.comm.locks import Locks
from unisono.comm.waiting import Waiter
from unisono.plan.rounds import Arrival, RoundsPool
from unisono.sync.turns import CLAIMS

TAKE_IN_ROUND, CLAIM = "take in a round", "claim"
"""What is asked of another host's."""


class GivesRounds(Protocol):
    """What hands out units round by round."""

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """A unit to compute in a round, and the round that is under way: None where that is a later one.

        Arguments:
            again: a unit that came late.
        """

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """Whether a unit that was computed in a round counts: else it is to be computed again."""


class AskedClaims:
    """The pool of another host.

    Arguments:
        asked: one of that host's workers.
    """

    def __init__(self, asked: Asks) -> None:
        self._asked = asked

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """See `GivesRounds`."""
        about = {"op": TAKE_IN_ROUND, "step": step, "round": number, "worker": worker, "again": again}
        said = self._asked.call(f"a unit of round {number} of step {step}", about)
        return said["unit"], said["round"]

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """See `GivesRounds`."""
        about = {"op": CLAIM, "step": step, "round": number, "worker": worker, "unit": unit}
        counts: bool = self._asked.call(f"end of unit {unit} of step {step}", about)["counts"]
        return counts


class Claims:
    """Those of a host's pool.

    Arguments:
        pool: units, and those that count.
        locks: of the pool.
        waiter: how one waits for others.
        name: a worker's for a reader.
    """

    def __init__(self, pool: RoundsPool, locks: Locks, waiter: Waiter, name: Callable[[int], str]) -> None:
        self._pool = pool
        self._locks = locks
        self._waiter = waiter
        self._name = name

    def begin(self, step: int) -> None:
        """Let the pool be that of a step."""
        with self._locks.held(CLAIMS, f"the units of step {step}"):
            if not self._pool.is_of(step):
                self._pool.begin(step, [0] * self._pool.layout.servers)

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """See `GivesRounds`."""
        pool = self._pool
        while True:
            self._waiter(
                lambda: True if pool.round != number or again is not None or pool.may_take else None,
                f"round {number} of step {step}",
                self.late,
            )
            with self._locks.held(CLAIMS, f"the units of step {step}"):
                over, unit = pool.round != number, again
                if not over and unit is None and pool.may_take:
                    unit = pool.take(worker)
            if over or unit is not None:  # else another was quicker
                return (None if over else unit), pool.round

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """See `GivesRounds`."""
        pool = self._pool
        with self._locks.held(CLAIMS, f"the units of step {step}"):
            counts = pool.arrive(number, Arrival(unit, worker, 0))
            if pool.round == number and pool.is_closed(number):
                pool.end(number, 0.0, 0.0)
        return counts

    def late(self) -> str:
        """Who is, for errors."""
        under_way = {worker: int(unit) - 1 for worker, unit in enumerate(self._pool.under_way) if unit}
        late = ", ".join(f"unit {unit} of {self._name(worker)}" for worker, unit in under_way.items())
        return f"too few gradients have come; under way: {late or 'none'}"
