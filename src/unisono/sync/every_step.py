"""Replicas agree at every step: the canonical sum, one update of each block by its owner, a commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unisono.comm.group import SNAPSHOT, Group
from unisono.config import ClipConfig
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
from unisono.sync.updater import Updater


@dataclass(frozen=True, slots=True)
class Rates:
    """The learning rate: a factor over steps, and one by the batch size; and the limits of gradients."""

    schedule: Schedule
    scale: float
    clip: ClipConfig | None


class BlockNumbers(Protocol):
    """How a number for each block comes together: its squared norm, for example."""

    def put(self, step: int, run: Run, values: Sequence[float]) -> None:
        """Leave those of a run."""

    def has(self, step: int, run: Run) -> bool:
        """Whether those of a run have been left."""

    def await_all(self, step: int) -> Sequence[Loss]:
        """Wait for all; workers that were lost meanwhile."""

    def all(self, step: int) -> Sequence[float]:
        """Those of all blocks."""


class Versions(Protocol):
    """How far blocks are."""

    def await_all(self, step: int, blocks: Sequence[int]) -> Sequence[Loss]:
        """Wait until some blocks are at ``step``; workers that were lost meanwhile."""


class GatheredSquares:
    """Squared norms, between hosts that share a state, each of which updates a part.

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
    """What the update of a step goes by, for those runs too that come to this worker later.

    Attributes:
        factors: by which clipping makes gradients smaller: of the model itself and of each replica.
    """

    sums: StepSums
    factors: Sequence[float]
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
        squares: BlockNumbers,
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
        self._updater = Updater(flat, optimizer, rates.clip)
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
        norm, factors = None, [1.0] * (1 + self._flat.replicas)
        limit = self._rates.clip.norm if self._rates.clip is not None else None
        if sums.weight != 0 and limit is not None:
            norms = self._norms(step, sums, phases)
            norm, factors = self._told_norm(step, norms), [clip_factor(each, limit) for each in norms]
        self._under_way = _UnderWay(sums, factors, bool(flags & SNAPSHOT))
        phases.enter("update")
        self._bring(list(self._holdings.runs), step, phases)
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
        self._bring(self._holdings.inherit(lost), step, phases)
        self._commit_buffers(step)

    def _bring(self, runs: Sequence[OwnedRun], step: int, phases: Phases) -> None:
        """Bring runs to the state after ``step``."""
        for owned in runs:
            self._update(owned, step)

    def _update(self, owned: OwnedRun, step: int) -> None:
        """Bring a run to the state after ``step``, unless it is there: whoever owned it before may have done so."""
        assert self._under_way is not None
        sums = self._under_way.sums
        if self._holdings.is_done(owned.run, step):
            return
        if sums.weights[owned.replica] == 0:
            self._commit(owned, step, None)
            return
        self._gradient(owned, sums)
        self._commit(owned, step, self._updater.update(owned, sums))

    def _commit(self, owned: OwnedRun, step: int, update: Callable[[], None] | None) -> None:
        """Let a run be at the state after ``step``.

        Arguments:
            update: changes it; None where the step does not.
        """
        assert self._under_way is not None
        journal, snapshot = self._holdings.journal, self._under_way.snapshot
        if update is None and not snapshot:
            journal.advance(owned.image, step)
        else:
            journal.commit(owned.image, step, update or (lambda: None), snapshot=snapshot)

    def _gradient(self, owned: OwnedRun, sums: StepSums) -> None:
        """What the optimizer is given for a run, into its scratch memory."""
        self._reduce(owned, sums)
        self._clip(owned)

    def _reduce(self, owned: OwnedRun, sums: StepSums) -> None:
        """The canonical mean of the run's gradient, into its scratch memory."""
        self._updater.reduce(owned, sums)

    def _clip(self, owned: OwnedRun) -> None:
        """Limit it."""
        assert self._under_way is not None
        self._updater.clip(owned, self._under_way.factors[owned.replica])

    def _squares_of(self, owned: OwnedRun, sums: StepSums) -> list[float]:
        """The squared norm of the gradient of each of the run's blocks."""
        self._reduce(owned, sums)
        return squared_norms(owned.gradients)

    def _norms(self, step: int, sums: StepSums, phases: Phases) -> list[float]:
        """The global norm, from the norms of blocks: of the model itself, and of each replica.

        Gradients are summed for it, and again for their update: to keep them would take 4 bytes a parameter.
        """
        self._leave_squares(step, sums, self._holdings.runs)
        self._await(
            lambda: self._squares.await_all(step),
            phases,
            "reduce",
            lambda runs: self._leave_squares(step, sums, runs),
        )
        squares, models = self._squares.all(step), 1 + self._flat.replicas
        each = len(squares) // models
        norms = [global_norm(squares[i * each : (i + 1) * each]) for i in range(models)]
        if broken := [norm for norm in norms if not np.isfinite(norm)]:
            raise TrainingError(
                f"the gradient's norm is {broken[0]} at step {step} though the loss is finite; "
                "lower the learning rate, or look at the model's numerics"
            )
        return norms

    def _await(
        self,
        wait: Callable[[], Sequence[Loss]],
        phases: Phases,
        phase: str,
        do: Callable[[Sequence[OwnedRun]], None],
    ) -> list[OwnedRun]:
        """Wait for the others, and do this worker's part of what those who are lost meanwhile would have.

        Arguments:
            wait: returns workers that were lost; none once all are there.
            phase: of what is done.

        Returns the runs that are new to it.
        """
        further: list[OwnedRun] = []
        phases.enter("wait")
        while lost := wait():
            phases.enter(phase)
            runs = self._holdings.inherit(lost)
            do(runs)
            further += runs
            phases.enter("wait")
        return further

    def _told_norm(self, step: int, norms: Sequence[float]) -> float | None:
        """The one that is shown of those of the model and of replicas."""
        return max(norms)

    def _leave_squares(self, step: int, sums: StepSums, runs: Sequence[OwnedRun]) -> None:
        for owned in runs:
            if not self._squares.has(step, owned.run):
                nothing = [0.0] * len(owned.gradients)
                found = self._squares_of(owned, sums) if sums.weights[owned.replica] else nothing
                self._squares.put(step, owned.run, found)

    def _commit_buffers(self, step: int) -> None:
        buffers, under_way = self._holdings.buffers, self._under_way
        assert under_way is not None
        if buffers is None or self._holdings.is_done(buffers.run, step):
            return
        sums = under_way.sums

        def update() -> None:
            self._updater.update_buffers(buffers, sums)
            self._finish_buffers(step, buffers.values)

        self._holdings.journal.commit(buffers.image, step, update, snapshot=under_way.snapshot)

    def _finish_buffers(self, step: int, values: Sequence[Tensor]) -> None:
        """What else changes in the buffers with a step: nothing."""
