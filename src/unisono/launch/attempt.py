"""What came before a set of workers: they are the first, or others were lost and all of this host start again."""

from dataclasses import dataclass

from unisono.fault.generation import Generation
from unisono.fault.rules import Rules


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came before a set of workers that runs a task.

    Attributes:
        restarts: how often it was started anew, before anything was trained.
        joins: the workers of other hosts train already.
        rolled_back: the last step that was committed, where there are snapshots to go on from; None for none.
        generation, rules: of the hosts that start again together, where there are several.
        before: the numbers of the hosts that trained before.
    """

    restarts: int = 0
    joins: bool = False
    rolled_back: int | None = None
    generation: Generation | None = None
    rules: Rules | None = None
    before: tuple[int, ...] = ()


class StartAgain(Exception):
    """A worker was lost, and all workers of this host start once more.

    Attributes:
        attempt: what they start as.
    """

    def __init__(self, attempt: Attempt) -> None:
        super().__init__("all workers of this host start again")
        self.attempt = attempt
