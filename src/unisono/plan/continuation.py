"""A step that others than those who began it go on with: what is published stays, the rest is divided among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unisono.plan.assignment import micro_batches
from unisono.plan.exchange import HostShare, Part
from unisono.plan.roster import consecutive
from unisono.run.summation import Node, accumulation


@dataclass(frozen=True, slots=True)
class Continuation:
    """The rest of a step.

    Attributes:
        shares: what each host contributes; the replica of a part is a slot.
        left: for each worker, the micro-batches that it computes yet.
        first: for each worker, its first buffer that holds nothing.
    """

    shares: tuple[HostShare, ...]
    left: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]

    @property
    def taken_over(self) -> int:
        """Micro-batches that are computed yet."""
        return sum(map(len, self.left))


def continuation(
    kept: Sequence[Mapping[int, Sequence[Node]]], slots: Sequence[Sequence[int]], count: int, entries: int
) -> Continuation | None:
    """Go on with a step of ``count`` micro-batches; None where nothing of it is there, or a worker would hold too much.

    Arguments:
        kept: of each host, what each slot has published, in its buffers from the first one on; whoever was in it.
        slots: of each host, those of the workers that go on.
        entries: buffers of a worker.

    >>> rest = continuation([{0: [Node(1, 0)], 1: []}, {0: [Node(1, 2)], 1: [Node(1, 3)]}], [[0], [0, 1]], 8, 10)
    >>> rest.left, rest.first, rest.shares[0].nodes
    (((), (2,), (3,)), (1, 1, 1), (Node(level=1, index=0),))
    """
    parts: list[list[Part]] = [[] for _ in kept]
    there: set[int] = set()
    for own, of_host in zip(parts, kept, strict=True):
        for slot, nodes in sorted(of_host.items()):
            for entry, node in enumerate(nodes):
                covered = range(node.start, min(node.stop, count))
                if there.isdisjoint(covered):
                    there.update(covered)
                    own.append(Part(node, slot, entry))
    missing = [m for m in range(count) if m not in there]
    if not there:
        return None
    workers = [(host, slot) for host, some in enumerate(slots) for slot in some]
    left, firsts = [], []
    for (host, slot), share in zip(workers, micro_batches(len(missing), len(workers)), strict=True):
        first = len(kept[host].get(slot, ()))
        left.append(tuple(missing[share.start : share.stop]))
        firsts.append(first)
        for run in consecutive(left[-1]):
            leaves, most = accumulation(run.start, run.stop, count)
            if first + most > entries:
                return None
            done = [leaf.completes for leaf in (leaf.moved(first) for leaf in leaves) if leaf.completes is not None]
            parts[host] += (Part(node, slot, entry) for node, entry in done)
            first += len(done)
    shares = tuple(HostShare(tuple(part.node for part in own), tuple(own)) for own in parts)
    return Continuation(shares, tuple(left), tuple(firsts))
