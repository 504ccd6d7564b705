"""Replicas agree at every step: the canonical sum, one update of each block by its owner, a commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unisono.comm.group import SNAPSHOT, Group
from unisono.errors import TrainingError
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.clipping import clip_factor, global_norm, squared_norms
from unisono.optim.schedules import Schedule
from unisono.plan.assignment import Run, Teams
from unisono.plan.blocks import FlatLayout
from unisono.plan.roster import Loss
from unisono.sync.holdings import Holdings
from unisono.sync.ownership import OwnedRun
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome
from unisono.sync.sums import StepSums


@dataclass(frozen=True, slots=True)
class Rates:
    """The learning rate: a factor over steps, a factor by the batch size, and the limit of the gradient's norm."""

    schedule: Schedule
    scale: float
    clip: float | None


class Squares(Protocol):
    """How the squared norms of blocks come together."""

    def put(self, step: int, run: Run, values: Sequence[float]) -> None:
        """Leave those of a run."""

    def has(self, step: int, run: Run) -> bool:
        """Whether those of a run have been left."""

    def await_all(self, step: int) -> Sequence[Loss]:
        """Wait for all; workers that were lost meanwhile."""

    def all(self, step: int) -> Sequence[float]:
        """Those of all blocks."""


class GatheredSquares:
    """Between hosts that share a state, each of which updates a part.

    Arguments:
        group: the workers of all hosts.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._own: list[float] = []
        self._all: list[float] = []

    def put(self, step: int, run: Run, values: Sequence[float]) -> None:
        """Keep those of a run until all are asked for."""
        self._own += values

    def has(self, step: int, run: Run) -> bool:
        """They are left once."""
        return False

    def await_all(self, step: int) -> Sequence[Loss]:
        """Exchange them; a worker that is lost ends this group."""
        everyone = self._group.all_gather(np.array(self._own).tobytes(), f"norm of step {step}")
        self._own, self._all = [], [square for payload in everyone for square in np.frombuffer(payload)]
        return ()

    def all(self, step: int) -> Sequence[float]:
        """Those of all blocks."""
        return self._all


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """What the update of a step goes by, for those runs too that come to this worker later."""

    sums: StepSums
    factor: float
    snapshot: bool


class EveryStep:
    """The exact policy.

    Arguments:
        group: the workers.
        flat: where gradients lie.
        teams: who computes which part of the model.
        count: micro-batches in a step.
        squares: the norms of blocks, for clipping.
        values: (segment, start, stop) -> the parameters that lie there.
        holdings: the runs that this worker updates.
        optimizer: how they are updated.
    """

    def __init__(
        self,
        group: Group,
        flat: FlatLayout,
        teams: Teams,
        count: int,
        squares: Squares,
        values: Callable[[int, int, int], Tensor],
        holdings: Holdings,
        optimizer: BlockOptimizer,
        rates: Rates,
    ) -> None:
        self._group = group
        self._flat = flat
        self._teams = teams
        self._count = count
        self._squares = squares
        self._values = values
        self._holdings = holdings
        self._optimizer = optimizer
        self._rates = rates
        self._uses_of = [flat.uses_of(p) for p in range(len(flat.parameters))]
        self._under_way: _UnderWay | None = None

    @torch.no_grad()
    def conclude(self, step: int, phases: Phases, rescue: Callable[[Sequence[int]], None]) -> Outcome:
        """Sum, clip, update and commit what this worker owns."""
        self._holdings.adopt(self._group.owners.members)
        phases.enter("wait")
        with torch.enable_grad():
            covers = self._group.collect(step, self._count, rescue)
        flags = self._group.all_flags()
        phases.enter("reduce")
        sums = StepSums(covers, self._count, self._flat, self._teams)
        self._optimizer.set_rate(self._rates.schedule, self._rates.scale, step - 1)
        norm, factor = None, 1.0
        if sums.weight != 0 and self._rates.clip is not None:
            norm = self._norm(step, sums, phases)
            factor = clip_factor(norm, self._rates.clip)
        self._under_way = _UnderWay(sums, factor, bool(flags & SNAPSHOT))
        phases.enter("update")
        for owned in list(self._holdings.runs):
            self._update(owned, step)
        if sums.weight != 0:
            phases.enter("wait")
            self._group.distribute(step, self._values)
        self._commit_buffers(step)
        return Outcome(
            loss=sums.loss / sums.weight if sums.weight else 0.0,
            weight=sums.weight,
            gradient_norm=norm,
            learning_rate=self._optimizer.learning_rate,
            flags=flags,
        )

    @torch.no_grad()
    def inherit(self, step: int, lost: Sequence[Loss], phases: Phases) -> None:
        """Update and commit this worker's part of what lost workers would have."""
        phases.enter("update")
        for owned in self._holdings.inherit(lost):
            self._update(owned, step)
        self._commit_buffers(step)

    def _update(self, owned: OwnedRun, step: int) -> None:
        """Bring a run to the state after ``step``, unless it is there: whoever owned it before may have done so."""
        assert self._under_way is not None
        sums, journal = self._under_way.sums, self._holdings.journal
        if self._holdings.is_done(owned.run, step):
            return
        if sums.weight == 0:
            journal.commit(owned.image, step, lambda: None, snapshot=self._under_way.snapshot)
            return
        self._reduce(owned, sums)
        if self._under_way.factor != 1.0:
            for span in owned.spans:
                span.scratch.mul_(self._under_way.factor)
        units, stretch = owned.units, owned.stretch
        if not sums.complete:  # like grad=None: what no micro-batch touched is skipped
            units = [unit for unit in units if sums.touched[self._uses_of[unit.parameter]].any()]

        def update() -> None:
            if stretch is not None and len(units) == len(owned.units) and stretch.uniform:
                self._optimizer.step_stretch(stretch)
            elif units:
                self._optimizer.step(units)

        journal.commit(owned.image, step, update, snapshot=self._under_way.snapshot)

    def _reduce(self, owned: OwnedRun, sums: StepSums) -> None:
        """The canonical mean of the run's gradient, into its scratch memory."""
        if sums.complete and owned.team is not None:
            for span in owned.spans:
                sums.mean_span(span, owned.team)
            return
        for span in owned.spans:
            span.scratch.zero_()
        for block, gradient in zip(self._flat.blocks[owned.run.first : owned.run.stop], owned.gradients, strict=True):
            sums.mean_block(block, self._uses_of[block.parameter], gradient)

    def _norm(self, step: int, sums: StepSums, phases: Phases) -> float:
        """The global norm, from the norms of blocks.

        Gradients are summed for it, and again for their update: to keep them would take 4 bytes a parameter.
        """
        self._leave_squares(step, sums, self._holdings.runs)
        phases.enter("wait")
        while lost := self._squares.await_all(step):
            phases.enter("reduce")
            self._leave_squares(step, sums, self._holdings.inherit(lost))
            phases.enter("wait")
        norm = global_norm(self._squares.all(step))
        if not np.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {norm} at step {step} though the loss is finite; "
                "lower the learning rate, or look at the model's numerics"
            )
        return norm

    def _leave_squares(self, step: int, sums: StepSums, runs: Sequence[OwnedRun]) -> None:
        for owned in runs:
            if not self._squares.has(step, owned.run):
                self._reduce(owned, sums)
                self._squares.put(step, owned.run, squared_norms(owned.gradients))

    def _commit_buffers(self, step: int) -> None:
        buffers, under_way = self._holdings.buffers, self._under_way
        assert under_way is not None
        if buffers is None or self._holdings.is_done(buffers.run, step):
            return
        sums, uses = under_way.sums, len(self._flat.uses)

        def update() -> None:
            for b, values in enumerate(buffers.values):
                if sums.touched[uses + b]:
                    sums.mean_buffer(uses + b, values)

        self._holdings.journal.commit(buffers.image, step, update, snapshot=under_way.snapshot)
