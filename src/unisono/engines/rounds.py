"""One worker's step where the first gradients of each round count: a synchronous server with backup workers.

In a round all compute with the same values. As soon as as many units have come as count, the servers are updated with
their mean, whoever is late; what comes late is computed again in a later round, so that every unit counts once. Without
backup workers it is the synchronous server, with the bits of the exact mode at the batch size of a round.

Chen et al., "Revisiting distributed synchronous SGD", 2016 (there, what comes late is dropped for good).
"""

from collections.abc import Callable, Sequence

import torch

from unisono.comm.host import HostGroup
from unisono.comm.locks import Locks
from unisono.comm.partial import Partial
from unisono.engines.meeting import Done, MeetingEngine
from unisono.engines.units import Pace, UnitGradients, clipped_by
from unisono.errors import TrainingError
from unisono.plan.rounds import Arrival, RoundsPool
from unisono.sync.phases import Phases
from unisono.sync.server import Servers
from unisono.sync.turns import POOL


class RoundsEngine(MeetingEngine):
    """Executes the steps of one worker.

    Arguments:
        group: the workers of this host.
        units: computes gradients with this worker's own values.
        servers: where they come from.
        pool: the step's units, and the rounds.
        locks: of the pool.
        pace: how workers proceed.
        snapshot: copies the state to where a checkpoint is written from.
        write: keeps which units counted in each round of a step, and what they came to.
    """

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        servers: Servers,
        pool: RoundsPool,
        locks: Locks,
        pace: Pace,
        phases: Phases,
        snapshot: Callable[[], object],
        write: Callable[[int, Sequence[Sequence[int]], Sequence[tuple[float, float]]], None],
    ) -> None:
        super().__init__(group, servers, phases, snapshot)
        self._servers = servers
        self._units = units
        self._pool = pool
        self._locks = locks
        self._pace = pace
        self._write = write
        self._again: int | None = None  # a unit that came late
        self._held = 0  # units of this worker that count in the round

    def _do(self, step: int) -> Done:
        """One round after another."""
        pool = self._pool
        self._servers.begin(step)
        self._again = None
        while (number := pool.round) < pool.layout.rounds:
            self._do_round(step, number)
        loss, weight = (sum(part) for part in zip(*pool.totals, strict=True))
        return Done(loss, weight, {0: pool.layout.units})

    def _record(self, step: int, done: Done) -> None:
        self._write(step, self._pool.members, self._pool.totals)

    def _keep(self, step: int) -> None:
        self._keep_together(self._pool, step)

    def _do_round(self, step: int, number: int) -> None:
        """Compute what this worker can for a round, wait until it is closed, and update what others have not."""
        self._held = 0
        self._phases.enter("update")
        self._servers.pull_all()
        while not self._pool.is_closed(number) and self._pool.round == number:
            unit = self._next(step)
            if unit is not None:
                self._compute(step, number, unit)
                continue
            self._phases.enter("wait")
            self._await_round(step, number)
        self._phases.enter("update")
        self._update(step, number)

    def _next(self, step: int) -> int | None:
        """A unit to compute: one that came late, that a lost worker has left, or one more where it is wanted."""
        unit, self._again = self._again, None
        if unit is not None:
            return unit
        pool, slot = self._pool, self._group.slot
        self._locks.hold(POOL, f"the pool of step {step}")
        for other in self._group.members:
            if unit is None and self._group.roll.is_lost(other):
                unit = pool.inherit(slot, other)
        if unit is None and pool.may_take:
            unit = pool.take(slot)
        self._locks.let_go(POOL)
        return unit

    def _compute(self, step: int, number: int, unit: int) -> None:
        """Compute a unit and bring it; where it comes late, it is this worker's next."""
        first = self._held * self._units.buffers
        partials = [self._group.partial(first + b) for b in range(self._units.buffers)]
        try:
            entry = first + self._units.fill(step, unit, partials, self._phases)
        except TrainingError:
            if self._pool.round == number and not self._pool.is_closed(number):
                raise
            self._again = unit  # what comes late does not count
            return
        self._phases.enter("wait")
        self._locks.hold(POOL, f"the pool of step {step}")
        counts = self._pool.arrive(number, Arrival(unit, self._group.slot, entry))
        self._locks.let_go(POOL)
        self._held += counts
        if not counts:
            self._again = unit

    def _await_round(self, step: int, number: int) -> None:
        """Wait until the round is closed, or one more unit is wanted, or a worker is lost."""
        pool = self._pool

        def ready() -> bool:
            return pool.round != number or pool.is_closed(number) or pool.may_take

        self._group.wait_or_lose(
            ready, f"round {number} of step {step}", lambda: f"too few gradients have come; {self._group.doing()}"
        )

    def _update(self, step: int, number: int) -> None:
        """Bring the servers to the end of a round that is closed."""
        pool = self._pool
        if pool.round != number:
            return
        arrivals = pool.arrivals(number)
        with torch.no_grad():
            sums = self._units.together([self._view(arrival) for arrival in arrivals])
            try:
                factor = clipped_by(self._pace.clip, sums, self._servers, step)
            except TrainingError:
                if pool.round == number:
                    raise
                return
            self._servers.update_all(
                [pool.version(server, number) for server in range(self._servers.count)],
                pool.busy,
                sums,
                factor,
                step,
                self._group.slot,
            )
        self._locks.hold(POOL, f"the pool of step {step}")
        pool.end(number, sums.loss, sums.weight)
        self._locks.let_go(POOL)

    def _view(self, arrival: Arrival) -> Partial:
        return self._group.view(arrival.slot, arrival.entry)
