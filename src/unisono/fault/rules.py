"""What is to be done about a worker that has ended: a pure decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from unisono.comm.header import Course

MOST_RESTARTS = 2
"""Of all workers, where one is lost before training begins."""
MOST_EARLY_ENDS = 3
"""Of workers in one place, one after another, that end before they have joined: then it stays empty."""
COMPUTING = ("data", "compute")


class Verdict(Enum):
    """What follows from a worker's end."""

    FAIL = "fail"  # the run ends
    RESTART = "restart"  # nothing was trained yet: all workers start again
    REJOIN = "rejoin"  # all workers of this host start again, and join the other hosts
    LEAVE = "leave"  # this host ends, the others go on
    ROLL_BACK = "roll back"  # all workers start again, from the newest snapshot
    REPLACE = "replace"  # the others take over, and another takes its place
    SHRINK = "shrink"  # the others take over


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run's configuration says, as workers tell their launcher.

    Attributes:
        on_loss: "replace", "shrink", "wait" or "stop".
        deadline_s: seconds without progress after which a worker is ended.
        slots: workers that the arena has room for.
        together: workers that compute a micro-batch together.
        run_dir: where reports go; None for nowhere.
        drain_s, notice_file, notice_command, host_deadline_s, on_tie: as of `config.FaultConfig`.
        several_hosts: other hosts go on where this one is lost.
        rolls_back: a worker's state ends with it, and there are snapshots.
    """

    on_loss: str
    deadline_s: float
    slots: int
    together: int = 1
    run_dir: str | None = None
    drain_s: float | None = None
    notice_file: str | None = None
    notice_command: str | None = None
    host_deadline_s: float = 1.5
    on_tie: str = "wait"
    several_hosts: bool = False
    rolls_back: bool = False

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> "Rules":
        """From a worker's message."""
        return cls(**{field.name: message[field.name] for field in fields(cls) if field.name in message})


@dataclass(frozen=True, slots=True)
class Death:
    """Where a worker was when it ended: its place, its process, and what it did.

    Attributes:
        trained: it took part.
        waited: it was ready to.
    """

    slot: int
    process: int
    activity: str
    step: int
    micro_batch: int | None
    trained: bool
    waited: bool = False

    @property
    def where(self) -> str:
        """For a reader."""
        which = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"in {self.activity} of step {self.step}{which}"

    def same_work(self, other: "Death") -> bool:
        """Whether both computed the same micro-batch of the same step."""
        computing = self.activity in COMPUTING and other.activity in COMPUTING
        same = (self.step, self.micro_batch) == (other.step, other.micro_batch)
        return computing and same and self.micro_batch is not None


def decide(
    rules: Rules | None, course: Course, death: Death, before: Sequence[Death], restarts: int, *, joins: bool = False
) -> Verdict:
    """What follows.

    Arguments:
        rules: None where nothing can be survived.
        course: of the training.
        before: earlier deaths of the run.
        restarts: how often all workers have been started again.
        joins: it was to join those who train, or had done so.
    """
    if course is Course.OVER and not death.trained:
        return Verdict.SHRINK  # it was not needed any more
    if rules is None or rules.on_loss == "stop" or course is Course.OVER:
        return Verdict.FAIL
    if course is Course.STARTING and rules.several_hosts and not rules.rolls_back:
        return _of_one_host(death, before) if joins else Verdict.FAIL
    if course is Course.STARTING:
        return Verdict.RESTART if restarts < MOST_RESTARTS else Verdict.FAIL
    if poisoned(death, before, rules.together) is not None:
        return Verdict.FAIL
    if rules.rolls_back:
        return Verdict.FAIL if _gets_nowhere(death, before) else Verdict.ROLL_BACK
    early = _early_ends(death, before)
    if rules.on_loss == "wait" and early >= MOST_EARLY_ENDS:
        return Verdict.FAIL
    if rules.on_loss == "shrink" or early >= MOST_EARLY_ENDS:
        return Verdict.SHRINK
    return Verdict.REPLACE


def _of_one_host(death: Death, before: Sequence[Death]) -> Verdict:
    """What follows where no worker of this host is left that trains, and other hosts go on."""
    return Verdict.LEAVE if _early_ends(death, before) >= MOST_EARLY_ENDS else Verdict.REJOIN


def _early_ends(death: Death, before: Sequence[Death]) -> int:
    """How many workers of a place, one after another, have ended before they were of any use."""
    early = 0
    for other in (death, *reversed(before)):
        if other.slot == death.slot:
            if other.trained or other.waited:
                break
            early += 1
    return early


def _gets_nowhere(death: Death, before: Sequence[Death]) -> bool:
    """Whether the last few, from whatever place, have ended without getting farther than the one before them."""
    steps = [other.step for other in (death, *reversed(before)) if other.trained][:MOST_EARLY_ENDS]
    return len(steps) == MOST_EARLY_ENDS and max(steps[:-1]) <= steps[-1]


def poisoned(death: Death, before: Sequence[Death], together: int) -> Death | None:
    """The earlier death on the same micro-batch, if there is one: it would be that of every worker that tries.

    Those who compute it together may die together; then it takes one more, who tried it in their place.
    """
    same = [other for other in before if death.same_work(other)]
    return same[0] if len(same) >= together else None
