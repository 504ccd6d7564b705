"""The micro-batches that a worker has under way, from their forwards to the ends of their backwards, stage by stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unisono.comm.forms import LINE_BYTES, alike
from unisono.comm.partial import Partial
from unisono.comm.passage import Arrived, Passages
from unisono.comm.passage_layout import Way
from unisono.data.feed import TrainingFeed
from unisono.parallel.micro_batch import Forwarded
from unisono.parallel.replicated import Replica
from unisono.plan.schedule import Action, Kind
from unisono.sync.phases import Phases

Entered = Sequence[tuple[Tensor, bool]]
"""What an earlier stage has sent, and whether it needs gradients."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Where a micro-batch's gradient goes (see `Replica.backward`).

    Attributes:
        chain: the partials that it is added along.
        opens: the first of them starts with no value.
        on_gradient: called with each use as soon as its gradient has been added.
    """

    chain: Sequence[Partial]
    opens: bool
    on_gradient: Callable[[int], None] | None = None


@dataclass(slots=True)
class _UnderWay:
    """A micro-batch on one stage, from its forward to the end of its backward.

    Attributes:
        activations, gradients: what has arrived for it, None where nothing does.
        computed: its backward is over.
        given: the stage before has what it waits for.
    """

    forwarded: Forwarded
    activations: Arrived | None
    gradients: Arrived | None = None
    computed: bool = False
    given: bool = False

    def release_if_over(self) -> bool:
        """Whether it is over; then the memory of what has arrived is given back."""
        over = self.computed and (self.given or self.activations is None)
        for arrived in (self.activations, self.gradients) if over else ():
            if arrived is not None:
                arrived.release()
        return over

    @property
    def roots(self) -> Sequence[Tensor | None]:
        """The gradients of what it made, from the next stage."""
        return self.gradients.tensors if self.gradients is not None else ()


class InFlight:
    """Those of one worker.

    Arguments:
        replica: computes them.
        feed: loads them.
        passages: to the other stages of a pipeline; None where there are none.
    """

    def __init__(self, replica: Replica, feed: TrainingFeed, phases: Phases, passages: Passages | None) -> None:
        self._replica = replica
        self._feed = feed
        self._phases = phases
        self._passages = passages
        self._arrived: dict[tuple[int, int], Arrived] = {}
        self._under_way: dict[tuple[int, int], _UnderWay] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def forget(self) -> None:
        """What was under way is of no use any more."""
        self._arrived.clear()
        self._under_way.clear()

    def forward(
        self, step: int, m: int, stage: int, before: Callable[[object, Entered], None] | None = None
    ) -> Forwarded:
        """Load a micro-batch and compute its forward.

        Arguments:
            before: is given the batch, and a copy of what has arrived, and may change them.
        """
        self._phases.enter("data", m)
        batch = self._feed.load(step, m)
        self._phases.enter("compute", m)
        activations = self._arrived.pop((stage, m), None)
        arrived: list[tuple[Tensor, bool]] = []
        if activations is not None:
            tensors = [tensor for tensor in activations.tensors if tensor is not None]
            arrived = list(zip(tensors, activations.needed, strict=True))
        if before is not None:
            before(
                batch, [(alike(tensor, tensor, tensor.data_ptr() % LINE_BYTES), needed) for tensor, needed in arrived]
            )
            batch = self._feed.load(step, m)
        forwarded = self._replica.forward(step, m, batch, stage, arrived)
        self._under_way[stage, m] = _UnderWay(forwarded, activations)
        return forwarded

    def backward_inputs(self, m: int, stage: int, sums: Sums) -> None:
        """The first part of its backward: the gradients of what has arrived."""
        self._phases.enter("compute", m)
        work = self._under_way[stage, m]
        self._replica.backward_inputs(
            work.forwarded, sums.chain, opens=sums.opens, gradients=work.roots, on_gradient=sums.on_gradient
        )

    def backward(self, m: int, stage: int, sums: Sums, *, weights_only: bool = False) -> None:
        """Its backward; or the second part, the gradients of the weights."""
        self._phases.enter("compute", m)
        work = self._under_way[stage, m]
        if weights_only:
            self._replica.backward_weights(work.forwarded, sums.chain, opens=sums.opens, on_gradient=sums.on_gradient)
        else:
            self._replica.backward(
                work.forwarded, sums.chain, opens=sums.opens, gradients=work.roots, on_gradient=sums.on_gradient
            )
        work.computed = True
        self._end_if_over(stage, m)

    def move(self, step: int, action: Action) -> None:
        """Take what another stage has sent, or give it what it waits for."""
        kind, m, stage = action.kind, action.micro_batch, action.stage
        assert self._passages is not None
        if kind is Kind.TAKE_ACTIVATION:
            self._phases.enter("wait", m)
            self._arrived[stage, m] = self._passages.receive(stage - 1, Way.ACTIVATIONS, step, m)
        elif kind is Kind.TAKE_GRADIENT:
            self._phases.enter("wait", m)
            self._under_way[stage, m].gradients = self._passages.receive(stage, Way.GRADIENTS, step, m)
        elif kind is Kind.GIVE_ACTIVATION:
            made = self._under_way[stage, m].forwarded.made
            needed = [tensor.requires_grad for tensor in made]
            self._passages.send(stage, Way.ACTIVATIONS, step, m, made, needed)
        else:
            work = self._under_way[stage, m]
            gradients = work.forwarded.entrance.gradients()
            self._passages.send(stage - 1, Way.GRADIENTS, step, m, gradients, [False] * len(gradients))
            work.given = True
            self._end_if_over(stage, m)

    def _end_if_over(self, stage: int, m: int) -> None:
        work = self._under_way[stage, m]
        if work.computed:
            work.forwarded.made, work.forwarded.rest = (), None  # the graph ends here
        if work.release_if_over():
            del self._under_way[stage, m]
