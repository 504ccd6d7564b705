"""One worker's step where nobody waits for the others: take a unit of work, pull, compute, push, until all are done.

A step is what lies between two meetings of the workers: there checkpoints are taken, models evaluated, workers let in.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from unisono.comm.host import HostGroup
from unisono.comm.locks import Locks
from unisono.errors import TrainingError
from unisono.meeting import Common, Done, MeetingEngine
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool, may_begin
from unisono.plan.roster import Loss
from unisono.sync.phases import Phases
from unisono.sync.server import POOL
from unisono.sync.sums import StepSums
from unisono.units import Pace, UnitGradients, clipped_by


class Pushed(Common, Protocol):
    """Values that a worker updates while others do."""

    def begin(self, step: int) -> None:
        """Let the pool be that of a step."""

    def pull(self) -> None:
        """Compute with what they are now."""

    def push(self, unit: int, sums: StepSums, factor: float, step: int) -> None:
        """Update them by a unit's gradient, made smaller by ``factor``."""

    def norm(self, sums: StepSums) -> float:
        """The norm of a unit's gradient."""

    def end(self, step: int) -> None:
        """All units of a step are done."""


class AsynchronousEngine(MeetingEngine):
    """Executes the steps of one worker.

    Arguments:
        group: the workers of this host.
        units: computes gradients with this worker's own values.
        values: where they come from, and what is updated.
        pool: the step's units.
        locks: of the pool.
        pace: how workers proceed.
        snapshot: copies the state to where a checkpoint is written from.
        record: keeps the order of a step's pushes.
    """

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        values: Pushed,
        pool: Pool | LockFreePool,
        locks: Locks,
        pace: Pace,
        phases: Phases,
        snapshot: Callable[[], object],
        record: Callable[[int], None],
    ) -> None:
        super().__init__(group, values, phases, snapshot)
        self._values = values
        self._units = units
        self._pool = pool
        self._locks = locks
        self._pace = pace
        self._write = record

    def _do(self, step: int) -> Done:
        """Take units until there are none."""
        pool = self._pool
        self._values.begin(step)
        while (unit := self._next(step)) is not None:
            self._work(step, unit)
        self._phases.enter("wait")
        while lost := self._await_units(step):
            self._take_over(step, lost)
        self._values.end(step)
        loss, weight = (float(value) for value in pool.sums.sum(axis=0))
        return Done(loss, weight, pool.staleness())

    def _record(self, step: int) -> None:
        self._write(step)

    def _keep(self, step: int) -> None:
        self._keep_together(self._pool, step)

    def _next(self, step: int) -> int | None:
        """The next unit, once this worker may begin one."""
        pool, slot = self._pool, self._group.slot

        def ready() -> bool | None:
            return True if pool.exhausted or self._may_begin() else None

        if self._pace.bound is not None:
            self._phases.enter("wait")
            self._group.waiter(ready, f"slower workers in step {step}", self._group.doing)
        self._locks.hold(POOL, f"the pool of step {step}")
        unit = pool.take(slot)
        self._locks.let_go(POOL)
        return unit

    def _may_begin(self) -> bool:
        group, clock = self._group, self._pool.clock
        clocks = [int(clock[slot]) for slot in group.members if not group.roll.is_lost(slot)]
        return may_begin(clocks, int(clock[group.slot]), self._pace.bound)

    def _work(self, step: int, unit: int, *, own: bool = True) -> None:
        """Pull, compute a unit's gradient, and push it.

        Arguments:
            own: it is this worker's own, and not one that a lost worker has left, for which nobody waits.
        """
        phases, pool = self._phases, self._pool
        phases.enter("update")
        self._values.pull()
        sums = self._units.compute(step, unit, phases)
        pool.sums[unit] = sums.loss, sums.weight
        phases.enter("update")
        with torch.no_grad():
            self._values.push(unit, sums, clipped_by(self._pace.clip, sums, self._values, step), step)
        self._units.release(sums)
        if own and not self._may_begin():  # others have only done more since
            raise TrainingError(
                f"rank {self._group.rank} is further ahead in step {step} than sync.staleness allows; this is a defect "
                "of Unisono"
            )
        pool.clock[self._group.slot] += own

    def _await_units(self, step: int) -> Sequence[Loss]:
        """Wait for what others have taken; those who were lost meanwhile."""
        absent = lambda: f"some are not done; {self._group.doing()}"  # noqa: E731
        return self._group.wait_or_lose(lambda: self._pool.all_done, f"units of step {step}", absent)

    def _take_over(self, step: int, lost: Sequence[Loss]) -> None:
        """Compute what lost workers had taken, unless another does."""
        for loss in lost:
            self._locks.hold(POOL, f"the pool of step {step}")
            unit = self._pool.inherit(self._group.slot, loss.slot)
            self._locks.let_go(POOL)
            self._values.pull()  # what it was about to say is said, and may be all of the unit
            if unit is not None and not self._pool.is_done(unit):
                self._work(step, unit, own=False)
                self._phases.enter("wait")
