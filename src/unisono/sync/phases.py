"""What a worker does now: told to its peers, measured, and told to listeners."""

import time
from collections.abc import Callable

from unisono.comm.group import Group
from unisono.events import PHASES, Emitter, PhaseEntered


class Phases:
    """A stopwatch over the phases of a step.

    Arguments:
        group: whose other members may wait for this worker.
        listeners: told of every phase where there are any; tests inject faults there.
        clock: seconds, monotonic.
    """

    def __init__(
        self, group: Group, listeners: Emitter | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._group = group
        self._listeners = listeners
        self._clock = clock
        self._step = 0
        self._phase: int | None = None
        self._since = 0.0
        self._seconds = [0.0] * len(PHASES)

    def begin(self, step: int) -> None:
        """What follows belongs to this step (from 1)."""
        self._step = step

    def enter(self, phase: str, micro_batch: int | None = None) -> None:
        """The worker leaves its phase for this one."""
        now = self._clock()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = PHASES.index(phase), now
        self._group.enter(phase, self._step, micro_batch)
        if self._listeners is not None:
            self._listeners(PhaseEntered(self._group.rank, self._step, phase, micro_batch))

    def lap(self) -> list[float]:
        """Seconds in each of `PHASES` since the last lap; counting starts anew."""
        now = self._clock()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        self._since = now
        result, self._seconds = self._seconds, [0.0] * len(PHASES)
        return result
