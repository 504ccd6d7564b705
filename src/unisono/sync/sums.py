"""The sums of one step: what published partials add up to, in the canonical order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.partial import Partial
from unisono.plan.blocks import Block, FlatLayout
from unisono.run.summation import Node, finish

Cover = Sequence[tuple[Node, Partial]]


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a segment's gradient, and the memory that receives their sum."""

    segment: int
    start: int
    stop: int
    scratch: Tensor


def add_trees(
    cover: Cover, count: int, view: Callable[[Partial], Tensor | None], out: Tensor | None = None
) -> Tensor | None:
    """The canonical sum of one part of every partial; None stands for a part that nobody touched.

    What `view` returns stays as it is. The last addition goes to ``out`` where that is given, others to new memory.
    """
    left_to_add = len(cover) - 1

    def add(left: tuple[Tensor | None, bool], right: tuple[Tensor | None, bool]) -> tuple[Tensor | None, bool]:
        nonlocal left_to_add
        left_to_add -= 1
        (a, a_mine), (b, b_mine) = left, right
        if a is None or b is None:
            return right if a is None else left
        if left_to_add == 0 and out is not None:
            return torch.add(a, b, out=out), True
        if a_mine:
            return a.add_(b), True
        if b_mine:
            return b.add_(a), True
        return torch.add(a, b), True

    return finish({node: (view(partial), False) for node, partial in cover}, count, add)[0]


class StepSums:
    """What the partials of one step come to.

    Attributes:
        loss, weight: summed over all micro-batches.
        touched: whether any micro-batch touched each entry (uses, then buffers).
        complete: every partial holds a gradient for every use, so sums need not be taken use by use.
    """

    def __init__(self, cover: Cover, count: int, flat: FlatLayout) -> None:
        self._cover = cover
        self._count = count
        self._flat = flat
        self.loss, self.weight = self._scalars()
        counts = [partial.counts_array() > 0 for _, partial in cover]
        self.touched: NDArray[np.bool_] = np.logical_or.reduce(counts)
        self.complete = all(bool(c[: len(flat.uses)].all()) for c in counts)

    def mean_span(self, span: Span) -> None:
        """The weighted mean of a span, into its scratch memory; only where the step is `complete`."""
        out = span.scratch
        total = add_trees(self._cover, self._count, lambda p: p.segments[span.segment][span.start : span.stop], out)
        assert total is not None
        if math.frexp(self.weight)[0] == 0.5:  # a power of two: to multiply gives the same bits, in half the time
            torch.mul(total, 1.0 / self.weight, out=out)
        else:
            torch.div(total, self.weight, out=out)

    def mean_block(self, block: Block, uses: Sequence[int], out: Tensor) -> None:
        """The weighted mean of a block, over micro-batches, then over its uses in the given order."""
        total: Tensor | None = None
        for use in uses:

            def view(partial: Partial, use: int = use) -> Tensor | None:
                return partial.entries[use].view(-1)[block.start : block.stop] if partial.counts[use] else None

            part = add_trees(self._cover, self._count, view)
            if part is not None:
                total = part if total is None else torch.add(total, part)
        if total is None:
            out.zero_()
        else:
            torch.div(total, self.weight, out=out)

    def mean_buffer(self, entry: int, out: Tensor) -> None:
        """A buffer's mean over the micro-batches that wrote it; a counter's value after the first of them."""

        def view(partial: Partial) -> Tensor | None:
            return partial.entries[entry] if partial.counts[entry] else None

        if self._cover[0][1].first_wins[entry]:
            first = finish({n: view(p) for n, p in self._cover}, self._count, lambda a, b: b if a is None else a)
            assert first is not None
            out.copy_(first)
        else:
            total = add_trees(self._cover, self._count, view)
            assert total is not None
            torch.div(total, sum(int(p.counts[entry]) for _, p in self._cover), out=out)

    def _scalars(self) -> tuple[float, float]:
        def add(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
            return a[0] + b[0], a[1] + b[1]

        return finish({node: (p.scalars[0], p.scalars[1]) for node, p in self._cover}, self._count, add)
