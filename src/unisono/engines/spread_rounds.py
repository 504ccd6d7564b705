"""One worker's step where the first gradients of each round count, and the servers are spread over several hosts.

What counts is decided on one host, before gradients travel; then each that counts is brought to all hosts, to each the
part that its servers need. A host updates its servers as soon as it has all: on whatever thread brings the last one, so
that nobody waits for a worker that is late with another. As `rounds.RoundsEngine`, with the same bits.
"""

from collections.abc import Callable, Sequence

from unisono.comm.host import HostGroup
from unisono.engines.meeting import Across, Done, MeetingEngine
from unisono.engines.units import UnitGradients
from unisono.errors import TrainingError
from unisono.sync.bringing import Part
from unisono.sync.brought import Brought
from unisono.sync.claims import Claims
from unisono.sync.phases import Phases
from unisono.sync.spread import SpreadServers


class SpreadRoundsEngine(MeetingEngine):
    """Executes the steps of one worker.

    Arguments:
        group: the workers of this host.
        units: computes gradients with this worker's own values.
        worker: its number among all.
        servers: where those come from.
        brought: the gradients that count, as this host needs them.
        part: what this worker does in a round; None for one that only answers others.
        claims: decides what counts, where that is on this host.
        write: keeps which units counted in each round of a step, and what they came to.
        across: the workers of other hosts; None where there are none.
    """

    def __init__(
        self,
        group: HostGroup,
        units: UnitGradients,
        worker: int,
        servers: SpreadServers,
        brought: Brought,
        part: Part | None,
        claims: Claims | None,
        phases: Phases,
        snapshot: Callable[[], object],
        write: Callable[[int, Sequence[Sequence[int]], Sequence[tuple[float, float]]], None],
        across: Across | None,
    ) -> None:
        super().__init__(group, servers, phases, snapshot, across)
        self._servers = servers
        self._units = units
        self._worker = worker
        self._brought = brought
        self._part = part
        self._claims = claims
        self._write = write
        self._again: int | None = None  # a unit that came late

    def _do(self, step: int) -> Done:
        """One round after another."""
        if self._claims is not None:
            self._claims.begin(step)
        self._servers.begin(step)
        pool, number = self._brought.pool, 0
        self._again = None
        while self._part is not None and number < pool.layout.rounds:
            number = self._do_round(step, number, self._part)
        self._phases.enter("wait")
        self._brought.wait(step, pool.layout.rounds, self._group.waiter)
        if self._claims is None:  # all know the same
            return Done(0.0, 0.0, {})
        loss, weight = (sum(part) for part in zip(*pool.totals, strict=True))
        return Done(loss, weight, {0: pool.layout.units})

    def _record(self, step: int, done: Done) -> None:
        if self._claims is not None:
            self._write(step, self._brought.pool.members, self._brought.pool.totals)

    def _keep(self, step: int) -> None:
        self._keep_together(self._brought.pool, step)

    def _do_round(self, step: int, number: int, part: Part) -> int:
        """Compute what this worker can for a round; the one that is under way when it is over."""
        self._phases.enter("wait")
        self._brought.wait(step, number, self._group.waiter)
        self._servers.pull({"round": number})
        held = 0  # units of this worker that count
        while True:
            self._phases.enter("wait")
            unit, now = part.claims.take(step, number, self._worker, self._again)
            if unit is None:
                return now
            first = held * self._units.buffers
            partials = [self._group.partial(first + b) for b in range(self._units.buffers)]
            self._again = unit
            try:
                entry = first + self._units.fill(step, unit, partials, self._phases)
            except TrainingError:
                if part.claims.take(step, number, self._worker, unit)[0] is not None:
                    raise
                continue  # what comes late does not count
            self._phases.enter("update")
            if part.claims.claim(step, number, self._worker, unit):
                self._again, held = None, held + 1
                part.bring(step, number, unit, entry)
