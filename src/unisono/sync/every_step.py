"""Replicas agree at every step: the canonical sum, one update of each block by its owner, a commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unisono.comm.group import SNAPSHOT, Group
from unisono.comm.journal import Journal
from unisono.errors import TrainingError
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.clipping import clip_factor, global_norm, squared_norms
from unisono.optim.schedules import Schedule
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.sync.ownership import OwnedBuffers, OwnedRun
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome
from unisono.sync.sums import StepSums


@dataclass(frozen=True, slots=True)
class Rates:
    """The learning rate: a factor over steps, a factor by the batch size, and the limit of the gradient's norm."""

    schedule: Schedule
    scale: float
    clip: float | None


class EveryStep:
    """The exact policy.

    Arguments:
        group: the workers.
        flat: where gradients lie.
        teams: who computes which part of the model.
        count: micro-batches in a step.
        keepers: those who share one state, each updating a part of it, and maybe other states' keepers behind them.
        sharers: how many of them share this one.
        values: (segment, start, stop) -> the parameters that lie there.
        owned: the runs that this worker updates.
        buffers: the buffers, where this worker commits them.
        journal, optimizer: how a run is committed, and how it is updated.
    """

    def __init__(
        self,
        group: Group,
        flat: FlatLayout,
        teams: Teams,
        count: int,
        keepers: Group,
        sharers: int,
        values: Callable[[int, int, int], Tensor],
        owned: Sequence[OwnedRun],
        buffers: OwnedBuffers | None,
        journal: Journal,
        optimizer: BlockOptimizer,
        rates: Rates,
    ) -> None:
        self._group = group
        self._flat = flat
        self._teams = teams
        self._count = count
        self._keepers = keepers
        self._sharers = sharers
        self._values = values
        self._owned = owned
        self._buffers = buffers
        self._journal = journal
        self._optimizer = optimizer
        self._rates = rates
        self._uses_of = [flat.uses_of(p) for p in range(len(flat.parameters))]

    @torch.no_grad()
    def conclude(self, step: int, phases: Phases) -> Outcome:
        """Sum, clip, update and commit what this worker owns."""
        phases.enter("wait")
        covers = self._group.collect(step, self._count)
        flags = self._group.all_flags()
        phases.enter("reduce")
        sums = StepSums(covers, self._count, self._flat, self._teams)
        snapshot = bool(flags & SNAPSHOT)
        self._optimizer.set_rate(self._rates.schedule, self._rates.scale, step - 1)
        norm, factor = None, 1.0
        if sums.weight != 0 and self._rates.clip is not None:
            norm = self._norm(step, sums, phases)
            factor = clip_factor(norm, self._rates.clip)
        if sums.weight == 0:
            for owned in self._owned:
                self._journal.commit(owned.image, step, lambda: None, snapshot=snapshot)
        else:
            phases.enter("update")
            for owned in self._owned:
                self._reduce(owned, sums)
                if factor != 1.0:
                    for span in owned.spans:
                        span.scratch.mul_(factor)
                self._update(owned, sums, step, snapshot)
            phases.enter("wait")
            self._group.distribute(step, self._values)
        if self._buffers is not None:
            self._commit_buffers(self._buffers, sums, step, snapshot)
        return Outcome(
            loss=sums.loss / sums.weight if sums.weight else 0.0,
            weight=sums.weight,
            gradient_norm=norm,
            learning_rate=self._optimizer.learning_rate,
            flags=flags,
        )

    def _update(self, owned: OwnedRun, sums: StepSums, step: int, snapshot: bool) -> None:
        units, stretch = owned.units, owned.stretch
        if not sums.complete:  # like grad=None: what no micro-batch touched is skipped
            units = [unit for unit in units if sums.touched[self._uses_of[unit.parameter]].any()]

        def update() -> None:
            if stretch is not None and len(units) == len(owned.units) and stretch.uniform:
                self._optimizer.step_stretch(stretch)
            elif units:
                self._optimizer.step(units)

        self._journal.commit(owned.image, step, update, snapshot=snapshot)

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
        squares: list[float] = []
        for owned in self._owned:
            self._reduce(owned, sums)
            squares += squared_norms(owned.gradients)
        phases.enter("wait")
        everyone = self._keepers.all_gather(np.array(squares).tobytes(), f"norm of step {step}")
        norm = global_norm(square for payload in everyone[: self._sharers] for square in np.frombuffer(payload))
        if not np.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {norm} at step {step} though the loss is finite; "
                "lower the learning rate, or look at the model's numerics"
            )
        return norm

    def _commit_buffers(self, buffers: OwnedBuffers, sums: StepSums, step: int, snapshot: bool) -> None:
        uses = len(self._flat.uses)

        def update() -> None:
            for b, values in enumerate(buffers.values):
                if sums.touched[uses + b]:
                    sums.mean_buffer(uses + b, values)

        self._journal.commit(buffers.image, step, update, snapshot=snapshot)
