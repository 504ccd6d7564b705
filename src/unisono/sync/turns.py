"""Which worker computes which unit of a step, and when it may begin one: asked of the pool that hands them out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from unisono.comm.calls import Asks
from unisono.comm.locks import Locks
from unisono.comm.waiting import Waiter
from unisono.errors import TrainingError
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool, may_begin

POOL, CLAIMS = 0, 1
"""The numbers of the locks of what hands out units."""


def lock_of(server: int) -> int:
    """The number of a server's lock."""
    return 2 + server


TAKE, OVER, WHO = "take", "over", "who"
"""What is asked of another host's pool."""


class GivesUnits(Protocol):
    """What hands out a step's units."""

    def take(self, step: int, worker: int) -> int | None:
        """The next unit, once the worker may begin one; None where there is no more."""

    def under_way(self, step: int) -> Mapping[int, int]:
        """Units that have been taken, and by whom, for errors."""

    def over(self, step: int, worker: int) -> None:
        """A worker's own unit is done, and not one that a lost worker has left, for which nobody waits.

        Raises:
            TrainingError: where the worker was further ahead than is allowed.
        """


class AskedTurns:
    """The pool of another host.

    Arguments:
        asked: one of that host's workers.
    """

    def __init__(self, asked: Asks) -> None:
        self._asked = asked

    def take(self, step: int, worker: int) -> int | None:
        """See `GivesUnits`."""
        given = self._asked.call(f"a unit of step {step}", {"op": TAKE, "step": step, "worker": worker})
        unit: int | None = given["unit"]
        return unit

    def under_way(self, step: int) -> Mapping[int, int]:
        """See `GivesUnits`."""
        return dict(self._asked.call(f"who has units of step {step}", {"op": WHO, "step": step})["units"])

    def over(self, step: int, worker: int) -> None:
        """See `GivesUnits`."""
        self._asked.call(f"end of a unit of step {step}", {"op": OVER, "step": step, "worker": worker})


class NoTurns:
    """Of a worker that computes nothing."""

    def take(self, step: int, worker: int) -> int | None:
        """None."""

    def under_way(self, step: int) -> Mapping[int, int]:
        """It does not know."""
        return {}

    def over(self, step: int, worker: int) -> None:
        """It has none."""


class Turns:
    """Those of a host's pool.

    Arguments:
        pool: the step's units.
        locks: of the pool.
        waiter: how one waits for slower workers.
        bound: how many units a worker may be ahead of the slowest; None for any number.
        counted: the numbers of the workers that units are for, and who are not lost.
        name: a worker's for a reader.
    """

    def __init__(
        self,
        pool: Pool | LockFreePool,
        locks: Locks,
        waiter: Waiter,
        bound: int | None,
        counted: Callable[[], Sequence[int]],
        name: Callable[[int], str],
    ) -> None:
        self._pool = pool
        self._locks = locks
        self._waiter = waiter
        self._bound = bound
        self._counted = counted
        self._name = name

    def take(self, step: int, worker: int) -> int | None:
        """See `GivesUnits`."""
        pool = self._pool

        def ready() -> bool | None:
            return True if pool.exhausted or self._may_begin(worker) else None

        if self._bound is not None:
            self._waiter(ready, f"slower workers in step {step}", self._slowest)
        with self._locks.held(POOL, f"the pool of step {step}"):
            return pool.take(worker)

    def under_way(self, step: int) -> Mapping[int, int]:
        """See `GivesUnits`."""
        return {int(unit) - 1: worker for worker, unit in enumerate(self._pool.under_way) if unit}

    def over(self, step: int, worker: int) -> None:
        """See `GivesUnits`."""
        if not self._may_begin(worker):  # others have only done more since
            raise TrainingError(
                f"{self._name(worker)} is further ahead in step {step} than sync.staleness allows; this is a defect of "
                "Unisono"
            )
        self._pool.clock[worker] += 1

    def _slowest(self) -> str:
        clock = self._pool.clock
        least = min(int(clock[worker]) for worker in self._counted())
        slow = [self._name(worker) for worker in self._counted() if clock[worker] == least]
        return f"{' and '.join(slow)} {'has' if len(slow) == 1 else 'have'} done {least} units only"

    def _may_begin(self, worker: int) -> bool:
        clock = self._pool.clock
        return may_begin([int(clock[other]) for other in self._counted()], int(clock[worker]), self._bound)
