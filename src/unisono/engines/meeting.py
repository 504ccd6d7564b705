"""A step of workers that do not wait for each other within it: they meet at its beginning and at its end.

At a meeting checkpoints are taken, the model is evaluated, workers are let in. What happens in between is a subclass's.
"""

import functools
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unisono.comm.group import SNAPSHOT
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.events import WireUse
from unisono.plan.pool import Taken
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome


@dataclass(frozen=True, slots=True)
class Done:
    """What a step came to: sums over its units, and how stale its pushes were.

    Attributes:
        taken: in which order servers took them, where that is wanted.
    """

    loss: float
    weight: float
    staleness: Mapping[int, int]
    taken: Taken | None = None

    def as_words(self) -> dict[str, Any]:
        """For a message."""
        taken = None if self.taken is None else self.taken.as_lists()
        return {"loss": self.loss, "weight": self.weight, "staleness": [*self.staleness.items()], "taken": taken}

    @classmethod
    def of_words(cls, words: Mapping[str, Any]) -> "Done":
        """From a message."""
        taken = None if words["taken"] is None else Taken.of_lists(words["taken"])
        return cls(words["loss"], words["weight"], dict(words["staleness"]), taken)

    def together(self, other: "Done") -> "Done":
        """This, and what another host did."""
        late = {*self.staleness, *other.staleness}
        staleness = {t: self.staleness.get(t, 0) + other.staleness.get(t, 0) for t in sorted(late)}
        taken = None if self.taken is None or other.taken is None else self.taken.together(other.taken)
        return Done(self.loss + other.loss, self.weight + other.weight, staleness, taken)


class Across:
    """The workers of all hosts, as they meet at the end of a step.

    Arguments:
        group: all of them.
        wire: what the step's messages took.
    """

    def __init__(self, group: HierarchicalGroup, wire: Callable[[], WireUse]) -> None:
        self._group = group
        self._wire = wire

    def conclude(self, step: int, done: Done, flags: int, seconds: Sequence[float]) -> tuple[Done, int]:
        """What the step came to on all hosts, and everyone's requests.

        Arguments:
            done, flags: of this host.
            seconds: of this worker, in each phase.
        """
        group = self._group
        first = group.local.rank == 0
        word = {"flags": flags, "seconds": list(seconds), "done": done.as_words() if first else None}
        said = [json.loads(payload) for payload in group.all_gather(json.dumps(word).encode(), f"end of step {step}")]
        flags = functools.reduce(operator.or_, (word["flags"] for word in said))
        group.note_step(flags, {rank: word["seconds"] for rank, word in enumerate(said)}, self._wire())
        hosts = [Done.of_words(word["done"]) for word in said if word["done"] is not None]
        return functools.reduce(Done.together, hosts), flags


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
        across: the workers of other hosts; None where there are none.
    """

    def __init__(
        self,
        group: HostGroup,
        values: Common,
        phases: Phases,
        snapshot: Callable[[], object],
        across: Across | None = None,
    ) -> None:
        self._group = group
        self._common = values
        self._phases = phases
        self._snapshot = snapshot
        self._across = across

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
        done, seconds = self._do(step), phases.lap()
        if self._across is not None:
            done, flags = self._across.conclude(step, done, flags, seconds)
        recorder = min(slot for slot in group.members if not group.roll.is_lost(slot))
        if group.slot == recorder:
            self._record(step, done)
        group.report(step, seconds)
        group.finish(step)
        while group.settle(step):
            pass  # whoever was lost had nothing left to do, but perhaps to record
        if group.roll.is_lost(recorder):
            self._record(step, done)
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

    def _record(self, step: int, done: Done) -> None:  # noqa: B027 - most need nothing
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
