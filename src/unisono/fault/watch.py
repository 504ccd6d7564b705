"""The launcher's eye on a host's arena: who gets on, who does not, and since when."""

import itertools
import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unisono.comm.header import Cause, Course, Header, header_bytes
from unisono.fault.rules import Death, Rules

SLOWER = 20
"""Times its median that an operation may take, where that is more than the deadline."""
FIRST = 2
"""Times the deadline that anything may take in a worker's first step, and before: much of it happens only once."""

START_S = 60.0
"""Seconds that a worker may take, at least, until it is ready to join: nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Silence:
    """A worker that neither gets on nor waits for others: its place, what it began last, and seconds since."""

    slot: int
    activity: str
    step: int
    micro_batch: int | None
    seconds: float
    limit_s: float


@dataclass(slots=True)
class _Progress:
    progress: int
    since: float
    first_step: int


class Watch:
    """Reads the words of one arena, and writes the launcher's.

    Arguments:
        descriptor: of the arena; stays the caller's.
        rules: of the run.
        clock: seconds, monotonic, as the workers' own.
    """

    def __init__(self, descriptor: int, rules: Rules, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self._clock = clock
        self._mapping = mmap.mmap(descriptor, header_bytes(rules.slots))
        self._memory = memoryview(self._mapping)
        self.header = Header(self._memory, rules.slots)
        self._progress: dict[int, _Progress] = {}
        self._lost_at: dict[int, float] = {}

    @property
    def course(self) -> Course:
        """How far the training is."""
        return self.header.course

    def death(self, slot: int, process: int) -> Death:
        """What a worker that has ended did last."""
        activity, step, micro_batch = self.header.doing(slot)
        return Death(slot, process, activity, step, micro_batch, self.trains(slot), self.header.ready(slot))

    def want(self, workers: int) -> None:
        """So many are to train; others that are ready wait as spares."""
        self.header.wanted = workers

    def dismiss(self, slot: int, *, leave: bool) -> None:
        """Ask a slot's worker to leave, or no longer."""
        self.header.ask_to_leave(slot, leave)

    def trains(self, slot: int) -> bool:
        """Whether a slot's worker takes part; one that has just started, or waits to be let in, does not."""
        return self.header.doing(slot)[0] != "start"

    def lose(self, slot: int, status: int, *, hung: bool) -> None:
        """A worker's process has ended: whatever it has written is final, and the others may go by it.

        Arguments:
            status: as ``waitpid`` gives it.
            hung: it was ended because it did not get on.
        """
        code = os.waitstatus_to_exitcode(status)
        cause = Cause.HUNG if hung else Cause.SIGNAL if code < 0 else Cause.EXIT
        self.header.set_ready(slot, False)
        self.header.lose(slot, cause, abs(code))
        self.header.set_activity(slot, "start", 0)  # whoever comes there next
        self._progress.pop(slot, None)
        self._lost_at[slot] = self._clock()

    def silent(self, slots: Sequence[int]) -> list[Silence]:
        """Those who have given no sign for longer than they may; the longest first."""
        if self.course is not Course.TRAINING:
            self._progress.clear()
            return []
        now, header, found = self._clock(), self.header, []
        for slot in slots:
            progress, (activity, step, micro_batch) = header.progress(slot), header.doing(slot)
            seen = self._progress.get(slot)
            if seen is None or seen.progress != progress:
                joins = seen is None or seen.first_step == 0
                self._progress[slot] = _Progress(progress, now, step if joins or seen is None else seen.first_step)
                continue
            silence = now - seen.since
            if silence <= self.rules.deadline_s:
                continue
            first = FIRST if step <= seen.first_step or activity == "start" else 1
            limit = max(first * self.rules.deadline_s, SLOWER * self._median(slot, activity))
            if activity == "start" and not header.ready(slot):
                limit = max(limit, START_S)  # it builds its model, and holds nobody up
            if silence > limit:
                found.append(Silence(slot, activity, step, micro_batch, silence, limit))
        return sorted(found, key=lambda silence: -silence.seconds)

    def _median(self, slot: int, activity: str) -> float:
        """Seconds that an operation of a kind has taken this worker, as its flight recorder shows.

        What it shows of a lost one in the same place does not count: that may have hung in such an operation.
        """
        since = self._lost_at.get(slot, float("-inf"))
        pairs = itertools.pairwise(o for o in self.header.flight(slot) if o.at_s >= since)
        took = [after.at_s - before.at_s for before, after in pairs if before.text.startswith(f"{activity} ")]
        return statistics.median(took) if took else 0.0

    def close(self) -> None:
        """Let go of the memory."""
        self.header.release()
        self._memory.release()
        self._mapping.close()
