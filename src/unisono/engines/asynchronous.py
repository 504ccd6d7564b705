"""One worker's step where nobody waits for the others: take a unit of work, pull, compute, push, until all are done.

A step is what lies between two meetings of the workers: there checkpoints are taken, models evaluated, workers let in.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from unisono.comm.host import HostGroup
from unisono.comm.locks import Locks
from unisono.engines.meeting import Across, Common, Done, MeetingEngine
from unisono.engines.units import Pace, UnitGradients, clipped_by
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool
from unisono.plan.roster import Loss
from unisono.sync.phases import Phases
from unisono.sync.sums import StepSums
from unisono.sync.turns import POOL, GivesUnits

MOST_NAMED = 8
"""Units that an error names."""


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
        worker: its number in the pool.
        values: where they come from, and what is updated.
        pool: the step's units, as far as this host has to do with them.
        turns: hands them out.
        locks: of the pool.
        pace: how workers proceed.
        snapshot: copies the state to where a checkpoint is written from.
        record: keeps the order of a step's pushes; None where it is not wanted.
        across: the workers of other hosts; None where there are none.
        name: a worker's for a reader.
    """

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        worker: int,
        values: Pushed,
        pool: Pool | LockFreePool,
        turns: GivesUnits,
        locks: Locks,
        pace: Pace,
        phases: Phases,
        snapshot: Callable[[], object],
        record: Callable[[int, Done], None] | None = None,
        across: Across | None = None,
        name: Callable[[int], str] = "rank {}".format,
    ) -> None:
        super().__init__(group, values, phases, snapshot, across)
        self._values = values
        self._units = units
        self._worker = worker
        self._pool = pool
        self._turns = turns
        self._locks = locks
        self._pace = pace
        self._write = record
        self._name = name

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
        taken = pool.taken() if self._write is not None and isinstance(pool, Pool) else None
        return Done(loss, weight, pool.staleness(), taken)

    def _record(self, step: int, done: Done) -> None:
        if self._write is not None:
            self._write(step, done)

    def _keep(self, step: int) -> None:
        self._keep_together(self._pool, step)

    def _next(self, step: int) -> int | None:
        """The next unit, once this worker may begin one."""
        if self._pace.bound is not None:
            self._phases.enter("wait")
        return self._turns.take(step, self._worker)

    def _work(self, step: int, unit: int, *, own: bool = True) -> None:
        """Pull, compute a unit's gradient, and push it.

        Arguments:
            own: it is this worker's own, and not one that a lost worker has left, for which nobody waits.
        """
        phases, units = self._phases, self._units
        phases.enter("update")
        self._values.pull()
        sums = units.compute(step, unit, phases)
        self._pool.sums[unit] = sums.loss, sums.weight
        phases.enter("update")
        with torch.no_grad():
            self._values.push(unit, sums, clipped_by(self._pace.clip, sums, self._values, step), step)
        units.release(sums)
        if own:
            self._turns.over(step, self._worker)

    def _await_units(self, step: int) -> Sequence[Loss]:
        """Wait for what others have taken, as long as something comes in time; those who were lost meanwhile."""
        return self._group.wait_or_lose(
            lambda: self._pool.all_done,
            f"units of step {step}",
            lambda: self._missing(step),
            progress=lambda: self._pool.progress,
        )

    def _missing(self, step: int) -> str:
        missing, who = self._pool.missing(), self._turns.under_way(step)
        named = [f"unit {unit} by {self._name(who[unit])}" for unit in missing if unit in who][:MOST_NAMED]
        what = [f"not done: {', '.join(named) or f'{len(missing)} units'}", self._group.doing()]
        return "; ".join(filter(None, what))

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
