"""One worker's step of a pipeline that does not drain within it: forwards go on while updates are made.

Each stage is updated as soon as the backwards of a unit are over there, and each backward uses the weights that its
forward has used. A step is what lies between two meetings of the workers: there checkpoints are taken and models
evaluated. On one worker the same versions are used one after another, so the result is the same, bit for bit.
"""

from collections.abc import Callable, Sequence

from unisono.comm.host import HostGroup
from unisono.comm.partial import Partial
from unisono.comm.passage import Passages
from unisono.comm.words import store_fence
from unisono.engines.meeting import Done, MeetingEngine
from unisono.in_flight import InFlight, Sums
from unisono.parallel.replicated import Replica
from unisono.parallel.stash import Stash
from unisono.plan.schedule import Action, Kind
from unisono.plan.stash import Stashing, StepWords
from unisono.run.summation import accumulation
from unisono.sync.phases import Phases
from unisono.sync.stash import StashedValues


class PipeDreamEngine(MeetingEngine):
    """Executes the steps of one worker.

    Arguments:
        stashing: how versions are used.
        actions: this worker's timetable, over all micro-batches of a step.
        replica: the model, of which ``stash`` holds the versions.
        in_flight: its micro-batches.
        values: what it updates.
        words: of all workers.
        partial: makes memory for sums.
        last: whether it computes the loss.
        passages: to the other stages; None where it computes all of them.
        snapshot: copies the state to where a checkpoint is written from.
    """

    def __init__(
        self,
        group: HostGroup,
        stashing: Stashing,
        actions: Sequence[Action],
        replica: Replica,
        stash: Stash,
        in_flight: InFlight,
        values: StashedValues,
        words: StepWords,
        partial: Callable[[], Partial],
        phases: Phases,
        snapshot: Callable[[], object],
        passages: Passages | None,
        *,
        last: bool,
    ) -> None:
        super().__init__(group, values, phases, snapshot)
        self._stashing = stashing
        self._actions = actions
        self._replica = replica
        self._stash = stash
        self._in_flight = in_flight
        self._values = values
        self._words = words
        self._passages = passages
        self._last = last
        self._leaves, buffers = accumulation(0, stashing.unit, stashing.unit)
        self._partials = [partial() for _ in range(buffers)]

    def _do(self, step: int) -> Done:
        """Its timetable, and an update after the last backward of each unit, once others have what they wait for."""
        self._replica.buffers.invalidate()
        due: int | None = None
        for number, action in enumerate(self._actions):
            if self._passages is not None:
                self._passages.check()
            self._execute(step, action)
            if action.kind is Kind.BACKWARD and (action.micro_batch + 1) % self._stashing.unit == 0:
                due = action.micro_batch // self._stashing.unit
                self._tell(due)
            gives = self._actions[number + 1 : number + 2]
            if due is not None and not (gives and gives[0].kind is Kind.GIVE_GRADIENT):
                self._phases.enter("update")
                self._values.update(due, self._sum_of(due), step)
                due = None
        self._phases.enter("update")
        self._values.end()
        self._stash.rest()
        self._in_flight.forget()
        loss, weight = (float(value) for value in self._words.sums.sum(axis=0))
        return Done(loss, weight, self._stashing.staleness())

    def _execute(self, step: int, action: Action) -> None:
        kind, m, stage = action.kind, action.micro_batch, action.stage
        if kind is Kind.FORWARD:
            self._values.take_in(self._in_flight.forward(step, m, stage).buffers)
        elif kind is Kind.BACKWARD:
            leaf = self._leaves[m % self._stashing.unit]
            self._in_flight.backward(m, stage, Sums([self._partials[b] for b in leaf.chain], leaf.opens))
        else:
            self._in_flight.move(step, action)

    def _tell(self, unit: int) -> None:
        """What a unit came to, before its gradients reach the other stages."""
        if self._last:
            self._words.sums[unit] = list(self._own_sum.scalars[:2])
            store_fence()

    def _sum_of(self, unit: int) -> Partial:
        """A unit's gradient on this worker's stages, with its loss and weight."""
        partial = self._own_sum
        partial.scalars[0], partial.scalars[1] = self._words.sums[unit]
        return partial

    @property
    def _own_sum(self) -> Partial:
        completes = self._leaves[-1].completes
        assert completes is not None
        return self._partials[completes[1]]

    def _keep(self, step: int) -> None:
        self._keep_together(self._words, step)
