"""What was seen of a run that faults struck, and what a kind of fault led to: as data."""

import itertools
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from unisono.launch.task import Ending


@dataclass(slots=True)
class Row:
    """What one kind of fault led to.

    Attributes:
        recovery_s: from each fault to the next commit.
        bound_s: what an undisturbed step, the recomputation and half a second come to.
        lost_steps: that had been committed, and had to be trained again.
        recomputed_micro_batches: the most for one fault.
        exactly_once: every step is on record once, with the loss of the undisturbed run.
        survivors_restarted: processes that ended without being struck.
        may_lose, starts_again: all start again from a snapshot when one is lost; then ``lost_steps`` are the most that
            one fault has cost, and it may cost so many.
        note: what else was looked at.
    """

    fault: str
    repetitions: int = 0
    recovery_s: list[float] = field(default_factory=list)
    bound_s: float | None = None
    lost_steps: int = 0
    recomputed_micro_batches: int = 0
    exactly_once: bool = True
    digest_equal: bool = True
    survivors_restarted: int = 0
    may_lose: int = 0
    starts_again: bool = False
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether everything is as it would have been."""
        others = self.starts_again or not self.survivors_restarted
        return self.exactly_once and self.digest_equal and self.lost_steps <= self.may_lose and others

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        at = sorted(self.recovery_s)
        return {
            "fault": self.fault,
            "repetitions": self.repetitions,
            "recovery_p50_s": round(statistics.median(at), 4) if at else None,
            "recovery_p95_s": round(at[math.ceil(0.95 * len(at)) - 1], 4) if at else None,  # nearest rank
            "recovery_max_s": round(at[-1], 4) if at else None,
            "bound_s": None if self.bound_s is None else round(self.bound_s, 4),
            "lost_steps": self.lost_steps,
            "recomputed_micro_batches": self.recomputed_micro_batches,
            "exactly_once": self.exactly_once,
            "digest_equal": self.digest_equal,
            "survivors_restarted": self.survivors_restarted,
            "note": self.note,
        }

    def as_text(self) -> str:
        """For a reader."""
        row = self.as_dict()
        times = ""
        if self.recovery_s:
            bound = f", bound {row['bound_s']:.2f} s" if self.bound_s is not None else ""
            longest = f"longest {row['recovery_max_s']:.2f} s"
            times = f"{row['recovery_p50_s']:.2f} s, p95 {row['recovery_p95_s']:.2f} s, {longest}{bound}; "
        return (
            f"{'ok ' if self.good else 'BAD'} {self.fault:<16} x{self.repetitions:<3} {times}"
            f"{self.recomputed_micro_batches} micro-batches again, {self.lost_steps} steps lost, "
            f"{self.survivors_restarted} survivors restarted, "
            f"digest {'equal' if self.digest_equal else 'DIFFERS'}{'; ' + self.note if self.note else ''}"
        )


@dataclass(slots=True)
class Observed:
    """What was seen of one run.

    Attributes:
        ending: how it ended; None where it was to end with an error, which is ``error``.
        committed_at: when each step was first seen committed.
        strikes: what workers told as they were struck: fault, time and process.
        ended: processes that ended while others trained.
        records: the run's events.
        limits_s: what workers that hung were given.
        over_at: when it ended.
        digests: of the states that several hosts ended with.
        struck_outside: who ends was struck from outside, or left.
    """

    ending: Ending | None = None
    error: str = ""
    committed_at: dict[int, float] = field(default_factory=dict)
    strikes: list[dict[str, Any]] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    records: list[dict[str, Any]] = field(default_factory=list)
    limits_s: list[float] = field(default_factory=list)
    over_at: float = 0.0
    digests: set[str] = field(default_factory=set)
    struck_outside: bool = False

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of all steps on record, in order."""
        return [(r["step"], r["loss"]) for r in self.records if r["event"] == "StepFinished"]

    @property
    def step_s(self) -> float:
        """The median step, the first ones left out."""
        times = [self.committed_at[step] for step in sorted(self.committed_at)][3:]
        return statistics.median(b - a for a, b in itertools.pairwise(times))

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [record for record in self.records if record["event"] == event]
