"""A worker's timetable as data: the engine runs it, a simulator can time it, a test can draw it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do for one micro-batch, on one stage of the model."""

    kind: Kind
    micro_batch: int
    stage: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}"


def data_parallel(micro_batches: Iterable[int]) -> tuple[Action, ...]:
    """Forward and backward of each micro-batch in turn: one activation memory, whatever their number.

    >>> " ".join(map(str, data_parallel(range(2))))
    'F0 B0 F1 B1'
    """
    return tuple(Action(kind, m) for m in micro_batches for kind in (Kind.FORWARD, Kind.BACKWARD))
