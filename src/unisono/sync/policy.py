"""The contract between the engine and whatever decides when replicas agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from unisono.plan.roster import Loss
from unisono.sync.phases import Phases


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to, the same for every worker.

    Attributes:
        loss: sum of losses over sum of weights.
        weight: the sum of weights; 0 means that nothing was updated.
        gradient_norm: before clipping, where it was needed.
        learning_rate: of the optimizer's first group.
        flags: requests that workers sent with the step.
    """

    loss: float
    weight: float
    gradient_norm: float | None
    learning_rate: float
    flags: int


class Policy(Protocol):
    """Turns published partials into the next state; the engine does not know which policy it runs."""

    def conclude(self, step: int, phases: Phases, rescue: Callable[[Sequence[int]], None]) -> Outcome:
        """Reduce, update and commit what this worker owns; the new state may be read once the group has settled.

        Arguments:
            rescue: computes and publishes micro-batches that lost workers have not.
        """

    def inherit(self, step: int, lost: Sequence[Loss], phases: Phases) -> None:
        """Do this worker's part of what lost workers have not done of `conclude`."""
