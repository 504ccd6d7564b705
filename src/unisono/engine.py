"""One worker's step: load, forward, backward, publish; then the policy reduces, updates and commits.

The engine executes a timetable (`plan.schedule`) and knows neither the policy nor how many workers there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from unisono.comm.copies import Copies
from unisono.comm.group import Group
from unisono.comm.partial import Partial, same_bits
from unisono.comm.passage import Passages
from unisono.data.feed import TrainingFeed
from unisono.errors import ImpureRunError, Regrouped, ReplicaBroken
from unisono.in_flight import Entered, InFlight, Sums
from unisono.parallel.micro_batch import Forwarded
from unisono.parallel.replicated import Replica
from unisono.plan.roster import consecutive
from unisono.plan.schedule import WHOLE, Action, Kind
from unisono.run.summation import Leaf, Node, accumulation
from unisono.sync.phases import Phases
from unisono.sync.policy import Outcome, Policy


@dataclass(frozen=True, slots=True)
class WorkShare:
    """What one worker does in a step, as data: its timetable, and how its micro-batches enter the sums.

    Attributes:
        rounds: each micro-batch's gradient is summed with others' at once.
    """

    actions: tuple[Action, ...]
    leaves: Mapping[int, Leaf]
    rounds: bool = False

    @property
    def stages(self) -> set[int]:
        """The stages of the model that it computes; `WHOLE` for all of them in one."""
        return {action.stage for action in self.actions}


def work_share(micro_batches: range, count: int, actions: Sequence[Action]) -> WorkShare:
    """The share of a worker that computes ``micro_batches`` of the ``count`` in a step.

    Arguments:
        actions: its timetable.
    """
    leaves, _ = accumulation(micro_batches.start, micro_batches.stop, count)
    return WorkShare(tuple(actions), {leaf.micro_batch: leaf for leaf in leaves})


def rounds_share(micro_batches: range, actions: Sequence[Action]) -> WorkShare:
    """The share of a worker whose micro-batches are each summed at once with those of the others."""
    leaves = {m: Leaf(m, (number,), True, (Node(0, m), number)) for number, m in enumerate(micro_batches)}
    return WorkShare(tuple(actions), leaves, rounds=True)


def lone_share(micro_batches: Sequence[int], count: int, stage: int, first_entry: int) -> WorkShare:
    """The share of a worker that computes any of a step's micro-batches by itself, one after another.

    Arguments:
        stage: `WHOLE` where others compute the model in stages.
        first_entry: its first buffer that is free.

    >>> [str(action) for action in lone_share([1, 4], 6, WHOLE, 0).actions]
    ['F1', 'B1', 'F4', 'B4']
    """
    leaves: list[Leaf] = []
    for run in consecutive(micro_batches):
        first = first_entry + sum(leaf.completes is not None for leaf in leaves)
        leaves += (leaf.moved(first) for leaf in accumulation(run.start, run.stop, count)[0])
    actions = [Action(kind, m, stage) for m in micro_batches for kind in (Kind.FORWARD, Kind.BACKWARD)]
    return WorkShare(tuple(actions), {leaf.micro_batch: leaf for leaf in leaves})


class Engine:
    """Executes the steps of one worker.

    Arguments:
        count: micro-batches in a step.
        share: what this worker does in the step that has begun.
        names: of all entries of a partial.
        partial: this worker's buffers, by number.
        passages: to the other stages of a pipeline; None where there are none.
        copies: what idle workers compute of this one's; None where they do not.
    """

    def __init__(
        self,
        group: Group,
        replica: Replica,
        feed: TrainingFeed,
        policy: Policy,
        count: int,
        share: Callable[[], WorkShare],
        phases: Phases,
        names: list[str],
        partial: Callable[[int], Partial],
        passages: Passages | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._copies = copies
        self._group = group
        self._replica = replica
        self._feed = feed
        self._in_flight = InFlight(replica, feed, phases, passages)
        self._policy = policy
        self._count = count
        self._share_of_step = share
        self._share = WorkShare((), {})
        self._phases = phases
        self._names = names
        self._partial = partial
        self._passages = passages
        self._last_micro_batch = -1
        self._left: dict[int, int] = {}  # micro-batch -> stages whose leaf is not complete
        self._first: _LeafCopy | None = None

    def step(self, step: int, *, check_purity: bool = False, last: bool = False) -> Outcome:
        """Train one step (from 1); the new state may be read when it returns.

        Arguments:
            check_purity: compute micro-batch 0 twice, and raise where the results differ; names the parameter.
            last: no step follows, so nothing is loaded ahead.

        Raises:
            Regrouped: where other hosts have done the step, and the state is there already.
        """
        while True:
            try:
                return self._attempt(step, check_purity=check_purity, last=last)
            except Regrouped as change:
                self._forget()
                if change.step >= step:  # others have done it
                    raise

    def _attempt(self, step: int, *, check_purity: bool, last: bool) -> Outcome:
        phases = self._phases
        phases.begin(step)
        self._group.begin(step, self._count)
        self._replica.buffers.invalidate()  # whoever used the model since may have written to them
        share = self._share_of_step()
        first = share.actions[0].micro_batch if share.rounds else 0
        try:
            self._work(step, share, self._copies, first if check_purity else None)
        except ReplicaBroken:  # what it has not published, others compute
            self._forget()
        outcome = self._policy.conclude(step, phases, lambda left: self._rescue(step, left))
        self._group.report(step, phases.lap())
        self._group.finish(step)
        if not last and share.actions:  # what follows counts for the next step
            phases.enter("data")
            self._feed.load_ahead(step + 1, share.actions[0].micro_batch)
        phases.enter("wait")
        while lost := self._group.settle(step):
            self._policy.inherit(step, lost, phases)
            phases.enter("wait")
        return outcome

    def _forget(self) -> None:
        """What was under way is of no use any more."""
        self._in_flight.forget()
        self._first = None

    def _work(self, step: int, share: WorkShare, copies: Copies | None = None, checked: int | None = None) -> None:
        """Compute and publish a share of the step.

        Arguments:
            copies: which others may make of it.
            checked: the micro-batch that is computed twice here.
        """
        self._share = share
        self._left = dict.fromkeys(share.leaves, len(share.stages))
        self._last_micro_batch = max((action.micro_batch for action in share.actions), default=-1)
        for action in share.actions:
            m, between = action.micro_batch, action.kind is Kind.FORWARD and not self._in_flight
            if copies is not None and between and copies.has(step, m):
                self._work_beside(step, copies, [later for later in share.leaves if later >= m])
                return
            self._group.check()
            if self._passages is not None and action.stage != WHOLE:
                self._passages.check()
            self._execute(step, action, action.micro_batch == checked)

    def _work_beside(self, step: int, copies: Copies, micro_batches: Sequence[int]) -> None:
        """The rest of this worker's share, from the first micro-batch that another worker computes too."""
        copies.leave_the_rest(step, micro_batches[0])
        for m in micro_batches:
            if not copies.is_there(step, m):
                copies.make(step, m, lambda m=m: self._rescue(step, [m]))  # type: ignore[misc]

    def _rescue(self, step: int, micro_batches: Sequence[int]) -> None:
        """Compute what other workers have not published: they are lost, or late.

        An attempt whose step has closed is dropped whole: what it has read may have been the next step's state.
        """
        stage = WHOLE if self._passages is not None else 0
        try:
            self._work(step, lone_share(micro_batches, self._count, stage, self._group.published(step)))
        except Exception:
            if self._copies is None or not self._copies.are_void(step):
                raise
            self._forget()
        self._phases.enter("wait")

    def _execute(self, step: int, action: Action, check_purity: bool) -> None:
        kind, m, stage = action.kind, action.micro_batch, action.stage
        if kind is Kind.FORWARD:
            self._forward(step, m, stage, check_purity)
        elif kind is Kind.BACKWARD:
            self._backward(step, m, stage)
        elif kind is Kind.INPUT:
            self._in_flight.backward_inputs(m, stage, self._sums(m))
        elif kind is Kind.WEIGHT:
            self._backward(step, m, stage, weights_only=True)
        else:
            self._in_flight.move(step, action)

    def _forward(self, step: int, m: int, stage: int, check_purity: bool) -> None:
        made: list[Forwarded] = []

        def rehearse(
            batch: object, arrived: Entered
        ) -> None:  # loading must be pure too, and a model may change its input
            made.append(self._replica.forward(step, m, batch, stage, arrived))
            if self._whole:
                self._replica.backward(made[0], self._chain(m), opens=True)
                self._first = _copy(self._chain(m)[0])

        forwarded = self._in_flight.forward(step, m, stage, rehearse if check_purity else None)
        if check_purity and not self._whole:
            _compare_made(step, stage, made[0], forwarded)
        if self._passages is None:
            self._group.foretell(step, m, forwarded.scalars)

    @property
    def _whole(self) -> bool:
        """Whether this worker computes and keeps whole gradients, until the step is over."""
        return (self._passages is None or WHOLE in self._share.stages) and not self._share.rounds

    def _on_gradient(self, m: int) -> Callable[[int], None] | None:
        """Who waits for gradients that are final in this worker's sums; nobody before they have been compared."""
        if self._first is not None:
            return None
        return self._group.on_gradient if m == self._last_micro_batch or self._share.rounds else None

    def _backward(self, step: int, m: int, stage: int, *, weights_only: bool = False) -> None:
        leaf = self._share.leaves[m]
        self._in_flight.backward(m, stage, self._sums(m), weights_only=weights_only)
        if self._first is not None:
            self._compare(step, self._first, _copy(self._chain(m)[0]))
            self._first = None
        self._left[m] -= 1
        if leaf.completes is not None and not self._left[m]:
            node, entry = leaf.completes
            self._group.publish(step, entry, node, whole=stage == WHOLE)

    def _sums(self, m: int) -> Sums:
        """Where a micro-batch's gradient goes."""
        return Sums(self._chain(m), self._opens(m), self._on_gradient(m))

    def _chain(self, micro_batch: int) -> list[Partial]:
        return [self._partial(b) for b in self._share.leaves[micro_batch].chain]

    def _opens(self, micro_batch: int) -> bool:
        """Whether the first partial of its chain starts with no value."""
        return self._share.leaves[micro_batch].opens

    def _compare(self, step: int, first: "_LeafCopy", second: "_LeafCopy") -> None:
        """Micro-batch 0 was computed twice from the same state: compare bit by bit."""
        for name, a, b in zip(self._names, first.entries, second.entries, strict=True):
            if not same_bits(a, b):
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


def _compare_made(step: int, stage: int, first: Forwarded, second: Forwarded) -> None:
    """A stage of a pipeline has computed micro-batch 0 twice."""
    for a, b in zip(first.made, second.made, strict=True):
        if not same_bits(a, b):
            raise ImpureRunError(
                f"the run is not pure: micro-batch 0 of step {step}, computed twice from the same state, gave two "
                f"results in stage {stage}; with one worker (-n 1), the parameter is named"
            )


def _copy(partial: Partial) -> _LeafCopy:
    entries = [entry.clone() if partial.counts[i] else None for i, entry in enumerate(partial.entries)]
    return _LeafCopy(partial.scalars[0], entries)
