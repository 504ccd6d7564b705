"""One host's part in summing a step across hosts: bucket by bucket, as soon as a backward has finished each.

A reduction is a generator: it posts messages, yields what must arrive, goes on, and ends when its sum is in the host's
total. So several buckets are under way at once in one thread, and the link is not idle while there is anything to send.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.bundle import All
from unisono.comm.canonical import sum_touched
from unisono.comm.host import HostGroup
from unisono.comm.partial import Partial
from unisono.comm.wire import Pending, Wire
from unisono.plan.blocks import FlatLayout
from unisono.plan.exchange import Bucket, HostShare, slices
from unisono.run.summation import Node

TAGS_A_BUCKET = 8
Crews = Sequence[Sequence[Sequence[int]]]
Reduction = Iterator[Pending]


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """What is exchanged in every step, the same on all hosts.

    Attributes:
        buckets: in the order in which they leave.
        shares: what each host contributes.
        count: micro-batches in a step.
    """

    buckets: tuple[Bucket, ...]
    shares: tuple[HostShare, ...]
    count: int


@dataclass(frozen=True, slots=True)
class HostSum:
    """One host's sums over a bucket: a flat tensor for every subtree, and how many micro-batches touched each use."""

    values: Mapping[Node, Tensor]
    counts: Tensor  # (subtrees, uses), int32

    def touched(self, nodes: Sequence[Node]) -> dict[Node, list[bool]]:
        """Whether each subtree touched each use."""
        return dict(zip(nodes, (self.counts > 0).tolist(), strict=True))


class HostSums:
    """Sums what the workers of this host have published.

    Arguments:
        local: the workers of this host.
        crews: for each team, those who compute together, replica by replica.
        flat: where gradients lie.
        share: what they publish.
        total: receives the sum over all hosts; until then it holds this host's sum over its first subtree.
    """

    def __init__(
        self, local: HostGroup, crews: Crews, flat: FlatLayout, share: HostShare, total: Partial, count: int
    ) -> None:
        self._local = local
        self._crews = crews
        self._flat = flat
        self._share = share
        self._total = total
        self._count = count

    def __call__(self, bucket: Bucket) -> HostSum:
        """The host's subtrees over a bucket; where one worker holds a whole subtree, its own memory."""
        values: dict[Node, Tensor] = {}
        counts = torch.zeros(len(self._share.nodes), len(bucket.uses), dtype=torch.int32)
        inside = pieces(self._flat, bucket, range(bucket.start, bucket.stop))
        for i, node in enumerate(self._share.nodes):
            partials = held(self._local, self._crews[bucket.team], self._share, node)
            views = {n: p.segments[bucket.segment][bucket.start : bucket.stop] for n, p in partials.items()}
            each = {n: [p.counts[use] for use in bucket.uses] for n, p in partials.items()}
            counts[i] = torch.tensor(list(each.values()), dtype=torch.int32).sum(0)
            if node in views:
                values[node] = views[node]
                continue
            out = self._total.segments[bucket.segment][bucket.start : bucket.stop]
            values[node] = out if i == 0 else torch.empty_like(out)
            touched = {n: [c > 0 for c in row] for n, row in each.items()}
            sum_touched(views, touched, inside, self._count, values[node], node)
        return HostSum(values, counts)


def held(local: HostGroup, crews: Sequence[Sequence[int]], share: HostShare, node: Node) -> dict[Node, Partial]:
    """What a team of this host has published of one of the host's subtrees."""
    return {
        part.node: local.view(crews[part.replica][0], part.entry)
        for part in share.parts
        if node.start <= part.node.start < node.stop
    }


def pieces(flat: FlatLayout, bucket: Bucket, part: range) -> list[slice]:
    """Where each use of a bucket lies inside elements ``part`` of its segment."""
    result = []
    for use in bucket.uses:
        place = flat.use_places[use]
        first = min(max(place.offset, part.start), part.stop)
        last = max(min(place.offset + place.numel, part.stop), first)
        result.append(slice(first - part.start, last - part.start))
    return result


Parts = Callable[[Bucket], Sequence[Sequence[slice]]]
"""Bucket -> for each host, the places in it that the host sums."""


def equal_parts(hosts: int) -> Parts:
    """Every host sums an equal slice of each bucket."""

    def parts(bucket: Bucket) -> list[list[slice]]:
        cuts = slices(bucket.start, bucket.stop, hosts)
        return [[slice(cut.start - bucket.start, cut.stop - bucket.start)] for cut in cuts]

    return parts


class Canonical:
    """The exact reduction: partials to all, a canonical sum of its own parts by each, and the sums back to all.

    Each member sends (n - 1)/n of every partial of its host, and (n - 1)/n of the gradient again; for ranges that are
    aligned subtrees that is one partial, as little as a ring sends. Where hosts share one state, each keeps the sums of
    its parts, and the second half of the way is left out.

    Arguments:
        data: carries gradients.
        control: carries counts, which lie in the host's memory.
        parts: who sums what.
        back: the sums go back to all.
    """

    def __init__(
        self,
        data: Wire,
        control: Wire,
        plan: ExchangePlan,
        flat: FlatLayout,
        sums: HostSums,
        total: Partial,
        parts: Parts,
        *,
        back: bool,
    ) -> None:
        self._data = data
        self._control = control
        self._plan = plan
        self._flat = flat
        self._sums = sums
        self._total = total
        self._parts = parts
        self._back = back
        self._others = [h for h in range(data.size) if h != data.rank]

    def __call__(self, bucket: Bucket, step: int) -> Reduction:
        """Sum one bucket over all hosts, into the total."""
        me, tag = self._data.rank, bucket.index * TAGS_A_BUCKET
        own = self._sums(bucket)
        parts = self._parts(bucket)
        lengths = [part.stop - part.start for part in parts[me]]
        out = self._total.segments[bucket.segment][bucket.start : bucket.stop]

        values = {node: [value[part] for part in parts[me]] for node, value in own.values.items()}
        counts = {me: own.counts}
        receives = []
        for h in self._others:
            nodes = self._plan.shares[h].nodes
            for node in nodes:
                received = out.new_empty(sum(lengths))
                receives.append((received, h))
                values[node] = list(torch.split(received, lengths))
            counts[h] = torch.empty(len(nodes), len(bucket.uses), dtype=torch.int32)
        sends = [(joined(value, parts[h]), h) for h in self._others for value in own.values.values()]
        moving = self._data.post(sends, receives, tag)
        counted = self._control.post(
            [(own.counts, h) for h in self._others], [(counts[h], h) for h in self._others], tag + 1
        )
        yield All([counted, moving])

        touched: dict[Node, list[bool]] = {}
        for h, rows in counts.items():
            touched |= dict(zip(self._plan.shares[h].nodes, (rows > 0).tolist(), strict=True))
        for i, part in enumerate(parts[me]):
            inside = pieces(self._flat, bucket, range(bucket.start + part.start, bucket.start + part.stop))
            summed_here = {node: several[i] for node, several in values.items()}
            sum_touched(summed_here, touched, inside, self._plan.count, out[part])
        if self._back:
            yield self._data.post(
                [(out[part], h) for h in self._others for part in parts[me]],
                [(out[part], h) for h in self._others for part in parts[h]],
                tag + 2,
            )

        summed = torch.cat([counts[h] for h in range(len(counts))]).sum(0).tolist()
        for use, number in zip(bucket.uses, summed, strict=True):
            self._total.counts[use] = number


def joined(values: Tensor, parts: Sequence[slice]) -> Tensor:
    """Parts of a flat tensor behind each other; in their own memory where there is one."""
    if len(parts) == 1:
        return values[parts[0]]
    return torch.cat([values[part] for part in parts]) if parts else values[:0]


class Words:
    """The words of a host's arena through which its workers follow an exchange."""

    def __init__(self, local: HostGroup) -> None:
        named = local.layout.regions.named
        self._ready = local.arena.words(named["ready"])
        self._summed = local.arena.words(named["summed"])
        self._buckets = local.layout.buckets
        self._generation = local.generation

    def _word(self, step: int) -> int:
        return (self._generation << 32) | step

    def set_ready(self, slot: int, bucket: int, step: int) -> None:
        """The slot's worker has finished its gradients of the bucket."""
        self._ready[slot * self._buckets + bucket] = self._word(step)

    def ready(self, slot: int, bucket: int, step: int) -> bool:
        """Whether it has."""
        return self._ready[slot * self._buckets + bucket] == self._word(step)

    def set_summed(self, bucket: int, step: int) -> None:
        """The bucket's sum over all hosts is in the total; number ``buckets`` stands for all that is no gradient."""
        self._summed[bucket] = self._word(step)

    def summed(self, bucket: int, step: int) -> bool:
        """Whether it is."""
        return self._summed[bucket] == self._word(step)

    def all_summed(self, step: int) -> bool:
        """Whether everything is."""
        return all(self.summed(bucket, step) for bucket in range(self._buckets + 1))

    @property
    def flags(self) -> int:
        """Requests of all workers of all hosts, with the step that was summed last."""
        return self._summed[self._buckets + 1]

    @flags.setter
    def flags(self, value: int) -> None:
        self._summed[self._buckets + 1] = value


@dataclass(slots=True)
class Lane:
    """One worker's part of the exchange: the buckets of its lane, in order.

    Attributes:
        ready: whether all workers of this host that compute a bucket's gradients have finished them.
        await_ready: waits until they have.
        reduce: sums one bucket over all hosts.
        done: told of each bucket whose sum is complete.
        ordered: every member must post in the same order, whatever is ready first.
        last: what the lane sums besides, once the backward is over; None for most lanes.
        finished: told when that is complete.
    """

    buckets: Sequence[Bucket]
    ready: Callable[[Bucket], bool]
    await_ready: Callable[[Bucket], None]
    reduce: Callable[[Bucket, int], Reduction]
    done: Callable[[Bucket], None]
    ordered: bool
    last: Callable[[int], Reduction] | None
    finished: Callable[[], None]
    exchanging_s: float = 0.0

    def run(self, step: int, turn: int, *, last: bool, alone: bool = False) -> None:
        """Exchange all of the lane's buckets.

        Arguments:
            turn: the step's number, or that of one of its rounds.
            last: no round of the step follows.
            alone: nothing is exchanged but what is no gradient: hosts do not sum theirs.
        """
        queue = _Queue()
        began = None
        for bucket in self.buckets if alone else ():
            self.done(bucket)
        for bucket in () if alone else self.buckets:
            while not self.ordered and not self.ready(bucket) and queue.early:
                queue.advance()
            self.await_ready(bucket)
            began = began or time.perf_counter()
            name = f"exchange of bucket {bucket.index} of step {step}"
            queue.begin(_UnderWay(name, self.reduce(bucket, turn), functools.partial(self.done, bucket)))
            for _ in range(queue.early - 1):  # with all first rounds at once, what they lead to would queue behind them
                queue.advance()
        if self.last is not None and last:
            queue.begin(_UnderWay(f"sums of step {step}", self.last(step), self.finished))
        while queue:
            queue.advance()
        self.exchanging_s += time.perf_counter() - began if began else 0.0


class _UnderWay:
    """A reduction that has begun.

    Attributes:
        rounds: those that are over.
    """

    def __init__(self, name: str, reduction: Reduction, done: Callable[[], None]) -> None:
        self._name = name
        self._reduction = reduction
        self._done = done
        self._pending = next(reduction, None)
        self.rounds = 0

    def advance(self) -> bool:
        """Wait for the round that is under way and start the next; False after the last."""
        if self._pending is not None:
            self._pending.wait(self._name)
            self._pending = next(self._reduction, None)
            self.rounds += 1
        if self._pending is None:
            self._done()
        return self._pending is not None


class _Queue:
    """Reductions that are under way, and which of them is waited for next: one thread waits for one round at a time.

    What was posted first is delivered first, and what it leads to must not wait: so that is waited for first. But
    members begin their buckets at different times, and must not wait for each other in a circle. In the first two
    rounds they cannot: whoever has not sent what another waits for is waiting itself in a bucket before that one, or in
    an earlier round of the same. From the third round on they could, for one whose next bucket has not begun anywhere
    else; so the third round waits until all buckets have begun and ended two, and from then on all go round by round.
    """

    def __init__(self) -> None:
        self._early: deque[_UnderWay] = deque()
        self._late: deque[_UnderWay] = deque()

    def __len__(self) -> int:
        return len(self._early) + len(self._late)

    @property
    def early(self) -> int:
        """Reductions in their first two rounds: only these may be waited for while a bucket has not begun."""
        return len(self._early)

    def begin(self, item: _UnderWay) -> None:
        """The item has posted its first round."""
        self._early.append(item)

    def advance(self) -> None:
        """Bring one reduction one round further."""
        item = (self._early or self._late).popleft()
        if item.advance():
            (self._early if item.rounds < 2 else self._late).append(item)
