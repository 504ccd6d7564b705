"""The weights of one stage of a pipeline, updated after each of its units: a new version where the oldest one lay.

Whoever computes a stage updates it; the others see it at the meeting that ends the step, when the newest version lies
in the training state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.partial import Partial
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.schedules import Schedule
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.plan.stash import Stashing, place
from unisono.run.summation import root
from unisono.state.training_state import TrainingState
from unisono.sync.ownership import OwnedRun
from unisono.sync.sums import StepSums
from unisono.sync.updater import Updater

Prepare = Callable[[TrainingState, Sequence[int]], list[OwnedRun]]
"""(where values lie, blocks) -> their runs, ready to be updated there."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Parameters of one delay.

    Attributes:
        places: their values, run by run, at each place.
        runs: the same, ready to be updated.
    """

    delay: int
    places: Sequence[Sequence[Tensor]]
    runs: Sequence[Sequence[OwnedRun]]


class StashedValues:
    """What one worker updates.

    Arguments:
        stashing: how versions are used.
        states: where values lie, at each place; the first is the training state.
        blocks: those of this worker's stages.
        prepare: makes them ready.
        teams: this worker's part of the model, and the rest.
        updater, optimizer: change them.
        rate: the schedule, and a factor.
        buffers: this worker's, which forwards change one after another: (own, in the state, whether they are of its
            stages).
    """

    def __init__(
        self,
        stashing: Stashing,
        states: Sequence[TrainingState],
        blocks: Sequence[int],
        prepare: Prepare,
        teams: Teams,
        updater: Updater,
        optimizer: BlockOptimizer,
        rate: tuple[Schedule, float],
        buffers: Sequence[tuple[Tensor, Tensor, bool]],
    ) -> None:
        self._stashing = stashing
        self._flat: FlatLayout = states[0].layout.flat
        self._teams = teams
        self._updater = updater
        self._optimizer = optimizer
        self._rate = rate
        self._buffers = buffers
        self._kinds: list[_Kind] = []
        delay_of = {block: stashing.delays[self._flat.blocks[block].parameter] for block in blocks}
        for delay in sorted(set(delay_of.values())):
            own = [block for block in blocks if delay_of[block] == delay]
            runs = [prepare(state, own) for state in states[: 1 + delay]]
            places = [
                [states[at].span(s.segment, s.start, s.stop) for owned in found for s in owned.spans]
                for at, found in enumerate(runs)
            ]
            self._kinds.append(_Kind(delay, places, runs))

    @torch.no_grad()
    def update(self, unit: int, partial: Partial, step: int) -> None:
        """Make the version after a unit, by its gradient.

        Arguments:
            step: which is under way (from 1).
        """
        self.rate(step)
        sums = StepSums([[(root(self._stashing.unit), partial)], []], self._stashing.unit, self._flat, self._teams)
        for kind in self._kinds:
            old, new = place(unit, kind.delay), place(unit + 1, kind.delay)
            if new != old:
                for target, source in zip(kind.places[new], kind.places[old], strict=True):
                    target.copy_(source)
            for owned in kind.runs[new] if sums.weight else ():
                self._updater.reduce(owned, sums)
                self._updater.clip(owned, 1.0)
                self._updater.update(owned, sums)()

    @torch.no_grad()
    def take_in(self, written: Sequence[Tensor | None]) -> None:
        """The next forward begins with the buffers that the last one wrote."""
        for (own, _, _), value in zip(self._buffers, written, strict=True):
            if value is not None:
                own.copy_(value)

    @torch.no_grad()
    def end(self) -> None:
        """The newest version lies in the training state."""
        for kind in self._kinds:
            newest = place(self._stashing.units, kind.delay)
            for target, source in zip(kind.places[0], kind.places[newest], strict=True):
                if newest:
                    target.copy_(source)
        for own, common, mine in self._buffers:
            if mine:
                common.copy_(own)

    @torch.no_grad()
    def pull_all(self) -> None:
        """Go on with the buffers that all have in common."""
        for own, common, _ in self._buffers:
            own.copy_(common)

    def rate(self, step: int) -> float:
        """Set the learning rate of a step, and say it."""
        schedule, scale = self._rate
        self._optimizer.set_rate(schedule, scale, step - 1)
        return self._optimizer.learning_rate


def own_team(teams: Teams, number: int) -> Teams:
    """One team, and all others as the second, of whom nothing comes."""
    return Teams(
        2,
        tuple(int(team != number) for team in teams.uses),
        tuple(int(team != number) for team in teams.buffers),
        0,
    )
