"""Which units count in each round, for workers of several hosts: decided by one pool, before their gradients travel."""

from collections.abc import Callable
from typing import Protocol

from unisono.comm.locks import Locks
from unisono.comm.waiting import Waiter
from unisono.plan.rounds import Arrival, RoundsPool

CLAIMS = 65
"""The number of the pool's lock; those of servers come before."""


class GivesRounds(Protocol):
    """What hands out units round by round."""

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """A unit to compute in a round, and the round that is under way: None where that is a later one.

        Arguments:
            again: a unit that came late.
        """

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """Whether a unit that was computed in a round counts: else it is to be computed again."""


class Claims:
    """Those of a host's pool.

    Arguments:
        pool: units, and those that count.
        locks: of the pool.
        waiter: how one waits for others.
        doing: what others do, for errors.
    """

    def __init__(self, pool: RoundsPool, locks: Locks, waiter: Waiter, doing: Callable[[], str]) -> None:
        self._pool = pool
        self._locks = locks
        self._waiter = waiter
        self._doing = doing

    def begin(self, step: int) -> None:
        """Let the pool be that of a step."""
        self._locks.hold(CLAIMS, f"the units of step {step}")
        if not self._pool.is_of(step):
            self._pool.begin(step, [0] * self._pool.layout.servers)
        self._locks.let_go(CLAIMS)

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """See `GivesRounds`."""
        pool = self._pool
        while True:
            self._waiter(
                lambda: True if pool.round != number or again is not None or pool.may_take else None,
                f"round {number} of step {step}",
                lambda: f"too few gradients have come; {self._doing()}",
            )
            self._locks.hold(CLAIMS, f"the units of step {step}")
            over, unit = pool.round != number, again
            if not over and unit is None and pool.may_take:
                unit = pool.take(worker)
            self._locks.let_go(CLAIMS)
            if over or unit is not None:  # else another was quicker
                return (None if over else unit), pool.round

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """See `GivesRounds`."""
        pool = self._pool
        self._locks.hold(CLAIMS, f"the units of step {step}")
        counts = pool.arrive(number, Arrival(unit, worker, 0))
        if pool.round == number and pool.is_closed(number):
            pool.end(number, 0.0, 0.0)
        self._locks.let_go(CLAIMS)
        return counts
