"""A step of workers that do not wait for each other within it: they meet at its beginning and at its end.

At a meeting checkpoints are taken, the model is evaluated, workers are let in. What happens in between is a subclass's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from unisono.comm.group import SNAPSHOT
from unisono.comm.host import HostGroup
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome


@dataclass(frozen=True, slots=True)
class Done:
    """What a step came to: sums over its units, and how stale its pushes were."""

    loss: float
    weight: float
    staleness: Mapping[int, int]


class Remembers(Protocol):
    """What knows before which step the state was last copied."""

    snapshot: int


class Common(Protocol):
    """The values that workers have in common."""

    def pull_all(self) -> None:
        """Compute with what they are, where nobody updates them."""

    def rate(self, step: int) -> float:
        """The learning rate in a step."""


class MeetingEngine(ABC):
    """Executes the steps of one worker.

    Arguments:
        group: the workers of this host.
        values: what they train.
        snapshot: copies the state to where a checkpoint is written from.
    """

    def __init__(self, group: HostGroup, values: Common, phases: Phases, snapshot: Callable[[], object]) -> None:
        self._group = group
        self._common = values
        self._phases = phases
        self._snapshot = snapshot

    def step(self, step: int, *, check_purity: bool = False, last: bool = False) -> Outcome:
        """Do this worker's part of a step (from 1), as much as it comes to.

        Arguments:
            check_purity, last: as of `Engine.step`; what others have changed meanwhile would look impure.
        """
        phases, group = self._phases, self._group
        phases.begin(step)
        group.begin(step, 0)
        phases.enter("wait")
        group.collect(step, 0, lambda micro_batches: None)  # who takes part
        flags = group.all_flags()
        if flags & SNAPSHOT:
            self._keep(step)
        done = self._do(step)
        recorder = min(slot for slot in group.members if not group.roll.is_lost(slot))
        if group.slot == recorder:
            self._record(step)
        group.report(step, phases.lap())
        group.finish(step)
        while group.settle(step):
            pass  # whoever was lost had nothing left to do, but perhaps to record
        if group.roll.is_lost(recorder):
            self._record(step)
        self._common.pull_all()
        return Outcome(
            loss=done.loss / done.weight if done.weight else 0.0,
            weight=done.weight,
            gradient_norm=None,
            learning_rate=self._common.rate(step),
            flags=flags,
            staleness=done.staleness,
        )

    @abstractmethod
    def _do(self, step: int) -> Done:
        """What lies between the meetings; all of the step is done when it returns."""

    def _record(self, step: int) -> None:  # noqa: B027 - most need nothing
        """Keep what a replay needs to know of a step that is done."""

    def _keep(self, step: int) -> None:
        """Copy the state as it is before the step."""
        self._snapshot()

    def _keep_together(self, pool: Remembers, step: int) -> None:
        """The chief does, and nobody changes the state before that."""
        group = self._group
        chief = group.roll.chief
        if group.chief:
            self._snapshot()
            pool.snapshot = step
        while lost := group.wait_or_lose(lambda: pool.snapshot == step, f"snapshot before step {step}", group.doing):
            if any(loss.slot == chief for loss in lost):
                return  # who would have written it
