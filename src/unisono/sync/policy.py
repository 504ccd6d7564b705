"""The contract between the engine and whatever decides when replicas agree."""

from collections.abc import Callable, Mapping, Sequence
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
        staleness: how many pushes were computed with values that so many others had made old; None where
            workers wait for each other.
    """

    loss: float
    weight: float
    gradient_norm: float | None
    learning_rate: float
    flags: int
    staleness: Mapping[int, int] | None = None


class Policy(Protocol):
    """Turns published partials into the next state; the engine does not know which policy it runs."""

    def conclude(self, step: int, phases: Phases, rescue: Callable[[Sequence[int]], None]) -> Outcome:
        """Reduce, update and commit what this worker owns; the new state may be read once the group has settled.

        Arguments:
            rescue: computes and publishes micro-batches that lost workers have not.
        """

    def inherit(self, step: int, lost: Sequence[Loss], phases: Phases) -> None:
        """Do this worker's part of what lost workers have not done of `conclude`."""


class Executes(Protocol):
    """An engine: does one worker's part of a step; who trains with it does not know which."""

    def step(self, step: int, *, check_purity: bool = False, last: bool = False) -> Outcome:
        """Train one step (from 1); the new state may be read when it returns.

        Arguments:
            check_purity: compute a micro-batch twice, and raise where the results differ.
            last: no step follows.
        """
