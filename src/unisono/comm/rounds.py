"""Sums of gradients in rounds: every micro-batch's gradient goes to those who keep its parts, and is given back.

In a round every host computes one micro-batch, the next in order of host; what is beyond the last does not count. Who
keeps a part adds the round's gradients to the canonical tree's pending sums of that part, leaf by leaf; nobody has more
than a part of any sum.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.comm.bundle import All
from unisono.comm.exchange import TAGS_A_BUCKET, Reduction, joined, pieces
from unisono.comm.partial import Partial
from unisono.comm.wire import Wire
from unisono.plan.exchange import Bucket
from unisono.plan.shards import StateShards
from unisono.run.summation import Leaf


class RoundSums:
    """One host's part in the rounds of a step.

    Arguments:
        data, control: wires for gradients, and for counts.
        shards: who keeps what.
        leaves: how each micro-batch of a step enters the tree.
        gradient: round -> this host's micro-batch.
        sums: the tree's pending sums, of which this host's parts have values.
        total: receives the counts; its gradients are the first of the sums.
        release: gives back the memory of elements of a segment of the gradient.
    """

    def __init__(
        self,
        data: Wire,
        control: Wire,
        shards: StateShards,
        leaves: Sequence[Leaf],
        gradient: Callable[[int], Partial],
        sums: Sequence[Partial],
        total: Partial,
        release: Callable[[int, int, int], None],
    ) -> None:
        self._data = data
        self._control = control
        self._shards = shards
        self._leaves = leaves
        self._gradient = gradient
        self._sums = sums
        self._total = total
        self._release = release
        self._others = [h for h in range(data.size) if h != data.rank]
        self._held: dict[int, list[list[bool]]] = {}  # bucket -> for each of the sums, whether each use has a value

    def __call__(self, bucket: Bucket, turn: int) -> Reduction:
        """Add a round's gradients of one bucket to the sums."""
        me, size, number = self._data.rank, self._data.size, turn % self._shards.rounds
        tag = bucket.index * TAGS_A_BUCKET
        leaf = self._gradient(number)
        own = leaf.segments[bucket.segment][bucket.start : bucket.stop]
        parts = self._shards.gradients(bucket)
        lengths = [part.stop - part.start for part in parts[me]]
        received = {h: own.new_empty(sum(lengths)) for h in self._others}
        counts = {h: torch.empty(len(bucket.uses), dtype=torch.int32) for h in self._others}
        counts[me] = torch.tensor([leaf.counts[use] for use in bucket.uses], dtype=torch.int32)
        sends = [(joined(own, parts[h]), h) for h in self._others]
        moving = self._data.post(sends, [(received[h], h) for h in self._others], tag)
        counted = self._control.post(
            [(counts[me], h) for h in self._others], [(counts[h], h) for h in self._others], tag + 1
        )
        yield All([counted, moving])

        if number == 0:
            self._held[bucket.index] = [[False] * len(bucket.uses) for _ in self._sums]
        counted_hosts = [h for h in range(size) if number * size + h < len(self._leaves)]
        for h in counted_hosts:
            values = [own[part] for part in parts[me]] if h == me else list(torch.split(received[h], lengths))
            self._add(bucket, self._leaves[number * size + h], values, (counts[h] > 0).tolist(), parts[me])
        summed = torch.stack([counts[h] for h in counted_hosts]).sum(0).tolist()
        for use, touched in zip(bucket.uses, summed, strict=True):
            self._total.counts[use] = touched + (self._total.counts[use] if number else 0)
        self._release(bucket.segment, bucket.start, bucket.stop)

    def _add(
        self, bucket: Bucket, leaf: Leaf, values: list[Tensor], touched: Sequence[bool], parts: Sequence[slice]
    ) -> None:
        """Add one micro-batch's gradients along its chain of sums (see `comm.partial.add_entry`)."""
        held = self._held[bucket.index]
        inside = [
            pieces(self._shards.flat, bucket, range(bucket.start + part.start, bucket.start + part.stop))
            for part in parts
        ]
        if leaf.opens:
            held[leaf.chain[0]] = [False] * len(bucket.uses)
        for number in leaf.chain:
            segment = self._sums[number].segments[bucket.segment][bucket.start : bucket.stop]
            targets = [segment[part] for part in parts]
            for value, target, places in zip(values, targets, inside, strict=True):
                _add_touched(value, target, places, touched, held[number])
            held[number] = [a or b for a, b in zip(touched, held[number], strict=True)]
            values, touched = targets, held[number]


def _add_touched(
    value: Tensor, target: Tensor, places: Sequence[slice], touched: Sequence[bool], held: Sequence[bool]
) -> None:
    """Add what was touched to what is held; what is not held yet takes the value as it is."""
    if all(touched) and all(held):
        target.add_(value)
    elif all(touched) and not any(held):
        target.copy_(value)
    else:
        for place, new, old in zip(places, touched, held, strict=True):
            if new and old:
                target[place].add_(value[place])
            elif new:
                target[place].copy_(value[place])
