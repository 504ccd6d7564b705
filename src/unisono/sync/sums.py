"""The sums of one step: what published partials add up to, in the canonical order."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.canonical import Cover, canonical_sum, sum_buffer, sum_scalars
from unisono.comm.partial import Partial
from unisono.plan.assignment import Teams
from unisono.plan.blocks import Block, FlatLayout


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a segment's gradient, and the memory that receives their sum."""

    segment: int
    start: int
    stop: int
    scratch: Tensor


BlockOfUses = tuple[Block, Sequence[int], Tensor]
"""A block, the uses of its parameter in order, and the memory of its gradient."""


class Gradient(Protocol):
    """A mean gradient, of which parts are asked for one after another.

    Attributes:
        weight: what it is the mean over; 0 where it is none.
        touched: whether there is one for each entry (uses, then buffers).
        complete: there is one for every use.
        rows: sparse gradients, by use, each one micro-batch's.
        totals: what they come to, by parameter, where that has been asked for.
    """

    @property
    def weight(self) -> float:
        """See above."""

    @property
    def touched(self) -> NDArray[np.bool_]:
        """See above."""

    @property
    def complete(self) -> bool:
        """See above."""

    @property
    def rows(self) -> Mapping[int, Sequence[Tensor]]:
        """See above."""

    @property
    def totals(self) -> MutableMapping[int, Tensor | None]:
        """See above."""

    def mean(self, spans: Sequence[Span], team: int | None, blocks: Sequence[BlockOfUses]) -> None:
        """That of a run, into the memory of its spans.

        Arguments:
            team: who has computed the whole of it; None where several have.
            blocks: of the run, in the same memory.
        """

    def mean_buffer(self, entry: int, out: Tensor) -> None:
        """The value of a buffer that was written."""


def add_trees(
    cover: Cover, count: int, view: Callable[[Partial], Tensor | None], out: Tensor | None = None
) -> Tensor | None:
    """The canonical sum of one part of every partial (see `canonical_sum`)."""
    return canonical_sum({node: view(partial) for node, partial in cover}, count, out=out)


class StepSums:
    """What the partials of one step come to.

    Arguments:
        covers: of each team.
        teams: whose partials hold what.
        rows: sparse gradients, by use, each one micro-batch's; they are no part of the partials.

    Attributes:
        totals: what sparse gradients of a parameter come to, where that has been asked for.
        loss, weight: summed over all micro-batches.
        weights: the same of the model itself and of each replica, where several train apart.
        touched: whether any micro-batch touched each entry (uses, then buffers).
        complete: every partial holds a gradient for every use, so sums need not be taken use by use; or for every use
            of some replicas, and none of others.
    """

    def __init__(
        self,
        covers: Sequence[Cover],
        count: int,
        flat: FlatLayout,
        teams: Teams,
        rows: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        self.rows = rows or {}
        self.totals: dict[int, Tensor | None] = {}
        self._covers = covers if len(covers) == teams.count else [covers[0]] * teams.count
        self._count = count
        self._flat = flat
        self._teams = teams
        self.loss, self.weight, *weights = sum_scalars(self._covers[teams.loss], count)
        self.weights = tuple(weights) or (self.weight,)
        self._use_of = {place.segment: use for use, place in enumerate(flat.use_places)} if flat.replicas else {}
        replica_of = np.array([flat.parameters[p].replica for _, p in flat.uses], dtype=np.int64)
        self.touched: NDArray[np.bool_] = np.zeros(len(teams.uses) + len(teams.buffers), dtype=np.bool_)
        self.complete = True
        members = np.array((*teams.uses, *teams.buffers), dtype=np.int64)
        for team, cover in enumerate(self._covers):
            own = members == team
            for _, partial in cover:
                counts = partial.counts_array() > 0
                counts[list(self.rows)] = True
                self.touched |= counts & own
                has, there = counts[: len(teams.uses)], own[: len(teams.uses)]
                for replica in range(1 + flat.replicas):
                    of_replica = has[there & (replica_of == replica)]
                    self.complete = self.complete and bool(of_replica.all() or (flat.replicas and not of_replica.any()))

    def mean(self, spans: Sequence[Span], team: int | None, blocks: Sequence[BlockOfUses]) -> None:
        """The canonical mean of a run's gradient (see `Gradient`)."""
        if self.complete and team is not None:
            for span in spans:
                self._mean_span(span, team)
            return
        for span in spans:
            span.scratch.zero_()
        for block, uses, gradient in blocks:
            self._mean_block(block, uses, gradient)

    def count_of(self, use: int) -> int:
        """How many micro-batches had a gradient of a use."""
        return sum(int(partial.counts[use]) for _, partial in self._covers[self._teams.uses[use]])

    def _mean_span(self, span: Span, team: int) -> None:
        """The weighted mean of a span of one team, into its scratch memory; only where the step is `complete`."""
        out, use = span.scratch, self._use_of.get(span.segment)  # by which one sees whether a replica was computed
        weight = self.weights[self._flat.segment_replicas[span.segment]]

        def view(partial: Partial) -> Tensor | None:
            held = use is None or partial.counts[use]
            return partial.segments[span.segment][span.start : span.stop] if held else None

        total = add_trees(self._covers[team], self._count, view, out)
        if total is None:
            out.zero_()
        elif math.frexp(weight)[0] == 0.5:  # a power of two: to multiply gives the same bits, in half the time
            torch.mul(total, 1.0 / weight, out=out)
        else:
            torch.div(total, weight, out=out)

    def _mean_block(self, block: Block, uses: Sequence[int], out: Tensor) -> None:
        """The weighted mean of a block, over micro-batches, then over its uses in the given order."""
        total: Tensor | None = None
        for use in uses:

            def view(partial: Partial, use: int = use) -> Tensor | None:
                return partial.entries[use].view(-1)[block.start : block.stop] if partial.counts[use] else None

            part = add_trees(self._covers[self._teams.uses[use]], self._count, view)
            if part is not None:
                total = part if total is None else torch.add(total, part)
        if total is None:
            out.zero_()
        else:
            torch.div(total, self.weights[self._flat.parameters[block.parameter].replica], out=out)

    def mean_buffer(self, entry: int, out: Tensor) -> None:
        """A buffer's mean over the micro-batches that wrote it; a counter's value after the first of them."""
        buffer = entry - len(self._flat.uses)
        cover = self._covers[self._teams.buffers[buffer]]
        total = sum_buffer(cover, buffer, self._count)
        assert total is not None
        if cover[0][1].first_wins[entry]:
            out.copy_(total)
        else:
            torch.div(total, sum(int(p.counts[entry]) for _, p in cover), out=out)
