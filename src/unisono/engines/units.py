"""The units of work of a parameter server: how their gradients are computed and clipped, and at what pace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unisono.comm.partial import Partial
from unisono.data.feed import TrainingFeed
from unisono.errors import TrainingError
from unisono.optim.clipping import clip_factor
from unisono.parallel.replicated import Replica
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.run.summation import Node, accumulation, root
from unisono.sync.phases import Phases
from unisono.sync.sums import StepSums


@dataclass(frozen=True, slots=True)
class Pace:
    """How workers proceed.

    Attributes:
        unit: micro-batches of a push.
        bound: how many units a worker may be ahead of the slowest; None for any number.
        clip: the limit of a push's gradient norm; None for none.
    """

    unit: int
    bound: int | None
    clip: float | None


class UnitGradients:
    """Computes the gradients of units, each in memory of its own until that is released.

    Arguments:
        replica: the model.
        count: micro-batches of a unit.
        flat, teams: where gradients lie.
        partial: makes memory for sums.
        rows: uses whose sparse gradients are kept as they are.

    Attributes:
        buffers: sums that one takes.
    """

    def __init__(
        self,
        replica: Replica,
        feed: TrainingFeed,
        count: int,
        flat: FlatLayout,
        teams: Teams,
        partial: Callable[[], Partial],
        rows: Sequence[int] = (),
    ) -> None:
        self._replica = replica
        self._feed = feed
        self._count = count
        self._flat = flat
        self._teams = teams
        self._partial = partial
        self._rows = rows
        self._leaves, self.buffers = accumulation(0, count, count)
        self._free: list[list[Partial]] = []
        self._in_use: dict[int, list[Partial]] = {}

    def compute(self, step: int, unit: int, phases: Phases) -> StepSums:
        """The gradient of a unit of a step, with the values that the model has now."""
        partials = self._free.pop() if self._free else self.new_memory()
        last = self.fill(step, unit, partials, phases)
        with torch.no_grad():
            cover = [(root(self._count), partials[last])]
            sums = StepSums([cover], self._count, self._flat, self._teams, partials[0].rows)
        self._in_use[id(sums)] = partials
        return sums

    def new_memory(self) -> list[Partial]:
        """For one unit's sums."""
        partials = [self._partial() for _ in range(self.buffers)]
        if self._rows:
            rows: dict[int, list[Tensor]] = {use: [] for use in self._rows}
            for partial in partials:
                partial.rows = rows
        return partials

    def fill(self, step: int, unit: int, partials: Sequence[Partial], phases: Phases) -> int:
        """Compute a unit of a step with the values that the model has now; which of the sums holds its gradient.

        Arguments:
            partials: memory for ``buffers`` sums.
        """
        self._replica.buffers.invalidate()
        for found in partials[0].rows.values():
            found.clear()
        for leaf in self._leaves:
            m = unit * self._count + leaf.micro_batch
            phases.enter("data", m)
            batch = self._feed.load(step, m)
            phases.enter("compute", m)
            forwarded = self._replica.forward(step, m, batch)
            self._replica.backward(forwarded, [partials[b] for b in leaf.chain], opens=leaf.opens)
        completes = self._leaves[-1].completes
        assert completes is not None
        return completes[1]

    def together(self, partials: Sequence[Partial]) -> StepSums:
        """What units, in order, come to."""
        count = len(partials)
        cover = [(Node(0, number), partial) for number, partial in enumerate(partials)]
        return StepSums([cover], count, self._flat, self._teams)

    def release(self, sums: StepSums) -> None:
        """Its memory may be used again."""
        self._free.append(self._in_use.pop(id(sums)))


class Measures(Protocol):
    """What knows how large a push's gradient is."""

    def norm(self, sums: StepSums) -> float:
        """The norm of a push's gradient."""


def clipped_by(limit: float | None, sums: StepSums, values: Measures, step: int) -> float:
    """What clipping by the norm makes of a push.

    Raises:
        TrainingError: where the norm is not a finite number.
    """
    if limit is None or sums.weight == 0:
        return 1.0
    with torch.no_grad():
        norm = values.norm(sums)
    if norm != norm or norm == float("inf"):
        raise TrainingError(
            f"the gradient's norm is {norm} in step {step} though the loss is finite; lower the learning rate, or look "
            "at the model's numerics"
        )
    return clip_factor(norm, limit)
