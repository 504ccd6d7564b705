"""One worker's step: load, forward, backward, publish; then the policy reduces, updates and commits.

The engine executes a timetable (`plan.schedule`) and knows neither the policy nor how many workers there are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.group import Group
from unisono.comm.partial import Partial
from unisono.data.feed import TrainingFeed
from unisono.errors import ImpureRunError
from unisono.parallel.replicated import Forwarded, Replica
from unisono.plan.schedule import Action, Kind, data_parallel
from unisono.run.summation import Leaf, accumulation
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome, Policy


@dataclass(frozen=True, slots=True)
class WorkShare:
    """What one worker does in a step, as data: its timetable, and how its micro-batches enter the sums."""

    actions: tuple[Action, ...]
    leaves: dict[int, Leaf]
    buffers: int


def work_share(micro_batches: range, count: int) -> WorkShare:
    """The share of a data-parallel worker that computes ``micro_batches`` of the ``count`` in a step."""
    leaves, buffers = accumulation(micro_batches.start, micro_batches.stop, count)
    return WorkShare(data_parallel(micro_batches), {leaf.micro_batch: leaf for leaf in leaves}, buffers)


class Engine:
    """Executes the steps of one worker."""

    def __init__(
        self,
        group: Group,
        replica: Replica,
        feed: TrainingFeed,
        policy: Policy,
        share: WorkShare,
        phases: Phases,
        names: list[str],
    ) -> None:
        self._group = group
        self._replica = replica
        self._feed = feed
        self._policy = policy
        self._share = share
        self._phases = phases
        self._names = names
        self._forwarded: dict[int, Forwarded] = {}
        self._first: _LeafCopy | None = None

    def step(self, step: int, *, check_purity: bool = False, last: bool = False) -> Outcome:
        """Train one step (from 1); the new state may be read when it returns.

        Arguments:
            check_purity: compute micro-batch 0 twice, and raise where the results differ; names the parameter.
            last: no step follows, so nothing is loaded ahead.
        """
        phases = self._phases
        phases.begin(step)
        self._group.begin(step)
        self._replica.buffers.invalidate()  # whoever used the model since may have written to them
        for action in self._share.actions:
            self._execute(step, action, check_purity)
        outcome = self._policy.conclude(step, phases)
        self._group.report(step, phases.lap())
        self._group.finish(step)
        if not last and self._share.actions:  # what follows counts for the next step
            phases.enter("data")
            self._feed.load_ahead(step + 1, self._share.actions[0].micro_batch)
        phases.enter("wait")
        self._group.settle(step)
        return outcome

    def _execute(self, step: int, action: Action, check_purity: bool) -> None:
        m = action.micro_batch
        if action.kind is Kind.FORWARD:
            self._phases.enter("data", m)
            batch = self._feed.load(step, m)
            self._phases.enter("compute", m)
            if check_purity and m == 0:
                self._replica.backward(self._replica.forward(step, m, batch), self._chain(m), opens=True)
                self._first = _copy(self._chain(m)[0])
                batch = self._feed.load(step, m)  # loading must be pure too, and the model may have changed its input
            self._forwarded[m] = self._replica.forward(step, m, batch)
        else:
            leaf = self._share.leaves[m]
            final = self._group.on_gradient if action is self._share.actions[-1] else None
            self._replica.backward(self._forwarded.pop(m), self._chain(m), opens=leaf.opens, on_gradient=final)
            if self._first is not None:
                self._compare(step, self._first, _copy(self._chain(m)[0]))
                self._first = None
            if leaf.completes is not None:
                node, entry = leaf.completes
                self._group.publish(step, entry, node)

    def _chain(self, micro_batch: int) -> list[Partial]:
        return [self._group.partial(b) for b in self._share.leaves[micro_batch].chain]

    def _compare(self, step: int, first: "_LeafCopy", second: "_LeafCopy") -> None:
        """Micro-batch 0 was computed twice from the same state: compare bit by bit."""
        for name, a, b in zip(self._names, first.entries, second.entries, strict=True):
            if not _same(a, b):
                raise ImpureRunError(
                    f"the run is not pure: micro-batch 0 of step {step}, computed twice from the same state, gave two "
                    f"gradients of {name}; look for random numbers that torch does not draw, for state kept on the "
                    "module that is no buffer, or for time"
                )
        if first.loss != second.loss:
            raise ImpureRunError(
                f"the run is not pure: micro-batch 0 of step {step}, computed twice, gave the losses "
                f"{first.loss} and {second.loss}, though all gradients agree"
            )


@dataclass(frozen=True, slots=True)
class _LeafCopy:
    loss: float
    entries: list[Tensor | None]


def _copy(partial: Partial) -> _LeafCopy:
    entries = [entry.clone() if partial.counts[i] else None for i, entry in enumerate(partial.entries)]
    return _LeafCopy(partial.scalars[0], entries)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bit for bit."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
