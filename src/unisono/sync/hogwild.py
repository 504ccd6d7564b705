"""Parameters that all workers of a host compute with and update at any time, without locks.

An update may be lost where two workers change the same element at once, and a gradient may be computed while values
change; where gradients are sparse, both are rare. No value is ever half-written: an element is stored as a whole.

Niu et al., "Hogwild!: A lock-free approach to parallelizing stochastic gradient descent", 2011.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.locks import Locks
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.clipping import global_norm, squared_norms
from unisono.optim.schedules import Schedule
from unisono.plan.lock_free import LockFreePool
from unisono.sync.ownership import OwnedBuffers, OwnedRun
from unisono.sync.sums import StepSums
from unisono.sync.tables import Table
from unisono.sync.turns import POOL
from unisono.sync.updater import Updater


class LockFreeValues:
    """The state, as one worker updates it.

    Arguments:
        slot: of the worker.
        runs: of parameters, each updated as one; they hold no table.
        tables: further parameters, of which only the rows are touched that have a gradient, with their values.
        buffers: of the model.
        pool: the step's units.
        locks: of the pool.
        updater, optimizer: how runs are updated.
        rate: the schedule, and the factor of the batch size.
        versions: one word a block.
    """

    def __init__(
        self,
        slot: int,
        runs: Sequence[OwnedRun],
        tables: Sequence[tuple[Table, Tensor]],
        buffers: OwnedBuffers,
        pool: LockFreePool,
        locks: Locks,
        updater: Updater,
        optimizer: BlockOptimizer,
        rate: tuple[Schedule, float],
        versions: memoryview,
    ) -> None:
        self._slot = slot
        self._runs = runs
        self._tables = tables
        self._buffers = buffers
        self._pool = pool
        self._locks = locks
        self._updater = updater
        self._optimizer = optimizer
        self._rate = rate
        self._versions: NDArray[np.uint64] = np.frombuffer(versions, dtype=np.uint64)
        self._read = 0

    def begin(self, step: int) -> None:
        """Let the pool be that of a step."""
        self._locks.hold(POOL, f"the pool of step {step}")
        if not self._pool.is_of(step):
            self._pool.begin(step)
        self._locks.let_go(POOL)

    def pull_all(self) -> None:
        """Nothing has to be copied: the model's values are the state's."""

    def pull(self) -> None:
        """Remember when a gradient's computation begins."""
        self._read = self._pool.pushes

    def push(self, unit: int, sums: StepSums, factor: float, step: int) -> None:
        """Update everything by a unit's gradient, whatever others do meanwhile.

        Arguments:
            factor: by which clipping makes it smaller.
            step: which is under way (from 1).
        """
        if sums.weight:
            self.rate(step)
            for owned in self._runs:
                self._updater.reduce(owned, sums)
                self._updater.clip(owned, factor)
                self._updater.update(owned, sums)()
            for table, values in self._tables:
                amount = -self._optimizer.rate_of(table.group) * factor / sums.weight
                for gradient in table.gradients(sums):
                    values.index_add_(0, gradient._indices()[0], gradient._values(), alpha=amount)
            self._updater.update_buffers(self._buffers, sums)
        self._pool.finish(unit, self._pool.pushes - self._read)

    def end(self, step: int) -> None:
        """Every block is at the step."""
        self._versions[:] = step

    def norm(self, sums: StepSums) -> float:
        """The norm of a unit's gradient."""
        squares: list[float] = []
        for owned in self._runs:
            self._updater.reduce(owned, sums)
            squares += squared_norms(owned.gradients)
        for table, _ in self._tables:
            if (total := table.total(sums)) is not None:
                squares += squared_norms([total.values() / sums.weight])
        return global_norm(squares)

    def rate(self, step: int) -> float:
        """Set the learning rate of a step, and say it."""
        schedule, scale = self._rate
        self._optimizer.set_rate(schedule, scale, step - 1)
        return self._optimizer.learning_rate
