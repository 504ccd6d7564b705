"""The runs that one worker updates: its own, and its part of those of workers that were lost in the step."""

from collections.abc import Callable, Mapping, Sequence

from unisono.optim.blockwise import BlockOptimizer
from unisono.plan.assignment import Run
from unisono.plan.roster import Loss, divided
from unisono.sync.commits import Commits
from unisono.sync.ownership import OwnedBuffers, OwnedRun, Owner

Shares = Callable[[Sequence[int]], Mapping[int, Sequence[Run]]]
"""Slots of those who train -> the runs that each updates; the buffers are a run too."""


class Holdings:
    """One worker's.

    Arguments:
        shares: who updates what.
        owner: prepares runs.
        optimizer: updates them.
        commits: how they are committed.

    Attributes:
        runs: this worker's.
        buffers: the buffers, where it commits them.
        journal: its own.
    """

    def __init__(
        self,
        shares: Shares,
        owner: Owner,
        optimizer: BlockOptimizer,
        commits: Commits,
    ) -> None:
        self._shares = shares
        self._owner = owner
        self._optimizer = optimizer
        self._commits = commits
        self._members: tuple[int, ...] = ()
        self._of: dict[int, list[Run]] = {}
        self._lost: list[int] = []
        self.runs: list[OwnedRun] = []
        self.buffers: OwnedBuffers | None = None
        self.journal = commits.journal

    def adopt(self, members: Sequence[int]) -> None:
        """These train now: what each of them updates follows."""
        if self._members == tuple(members) and not self._lost:
            return
        self._members = tuple(members)
        self._lost = []
        self._of = {slot: list(runs) for slot, runs in self._shares(members).items()}
        self._optimizer.detach_all()
        self.runs, self.buffers = self._prepared(self._of.get(self._commits.slot, []))

    def inherit(self, lost: Sequence[Loss]) -> list[OwnedRun]:
        """This worker takes its part of what lost workers would have updated; the runs that are new to it."""
        mine: list[Run] = []
        for loss in lost:
            self._lost.append(loss.slot)
            for heir, runs in divided(self._of.pop(loss.slot, []), loss.heirs).items():
                self._of.setdefault(heir, []).extend(runs)
                if heir == self._commits.slot:
                    mine += runs
        prepared, buffers = self._prepared(mine)
        self.runs += prepared
        self.buffers = self.buffers or buffers
        return prepared

    def is_done(self, run: Run, step: int) -> bool:
        """Whether a run is at ``step``; what a lost worker was doing with it when it ended is put back, or finished."""
        for slot in self._lost:
            self._commits.recover(slot, run)
        return self._commits.at(run.stop - 1) >= step

    def _prepared(self, runs: Sequence[Run]) -> tuple[list[OwnedRun], OwnedBuffers | None]:
        trained = [run for run in runs if run != self._owner.buffer_run]
        buffers = self._owner.prepare_buffers() if len(trained) < len(runs) else None
        return self._owner.prepare(trained, self._optimizer), buffers
