"""How a step's partials become one sum across hosts, as data: buckets and their slices, and who holds which subtree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from unisono.plan.assignment import Teams, micro_batches
from unisono.plan.blocks import FlatLayout, aligned
from unisono.run.summation import Node, accumulation, subtrees


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that travel together: elements [start, stop) of a segment, the whole gradients of ``uses``.

    Attributes:
        index: its place in the order in which a backward finishes buckets.
        lane: the local rank that exchanges it, on every host.
        team: who computes its gradients; its lane's worker is one of them.
    """

    index: int
    lane: int
    team: int
    segment: int
    start: int
    stop: int
    uses: tuple[int, ...]


def buckets(
    flat: FlatLayout, item_bytes: Sequence[int], first_bytes: int, bucket_bytes: int, teams: Teams, lanes: Sequence[int]
) -> tuple[Bucket, ...]:
    """Cut the gradient into buckets, from its end: a backward finishes the last use first.

    Where replicas train apart, theirs stay where they are: it is the model's own gradient that is cut.

    Arguments:
        item_bytes: of an element of each segment.
        first_bytes: the least size of a team's first; each one after it may be twice as large,
        bucket_bytes: up to this least size.
        teams: who computes what.
        lanes: the team of each local rank that exchanges; a bucket goes to that of its team's with the fewest bytes so
            far.
    """
    load = [0] * len(lanes)
    result: list[Bucket] = []
    for members in _neighbours(flat, item_bytes, first_bytes, bucket_bytes, teams.uses):
        first, last, team = flat.use_places[members[-1]], flat.use_places[members[0]], teams.uses[members[0]]
        lane = min((lane for lane, of in enumerate(lanes) if of == team), key=load.__getitem__)
        stop = last.offset + aligned(last.numel)
        load[lane] += (stop - first.offset) * item_bytes[first.segment]
        result.append(Bucket(len(result), lane, team, first.segment, first.offset, stop, tuple(reversed(members))))
    return tuple(result)


def _neighbours(
    flat: FlatLayout, item_bytes: Sequence[int], first_bytes: int, bucket_bytes: int, teams: Sequence[int]
) -> Iterator[list[int]]:
    """Uses of one team that lie behind each other, the last first, until they are enough."""
    members: list[int] = []
    size_bytes = 0
    least = dict.fromkeys(teams, first_bytes)
    for use in reversed([u for u, (_, p) in enumerate(flat.uses) if not flat.parameters[p].replica]):
        place, team = flat.use_places[use], teams[use]
        if members:
            next_place, next_team = flat.use_places[members[-1]], teams[members[-1]]
            adjacent = next_place.segment == place.segment and place.offset + aligned(place.numel) == next_place.offset
            if size_bytes >= min(least[next_team], bucket_bytes) or not adjacent or team != next_team:
                yield members
                least[next_team] *= 2
                members, size_bytes = [], 0
        members.append(use)
        size_bytes += aligned(place.numel) * item_bytes[place.segment]
    if members:
        yield members


def slices(start: int, stop: int, count: int) -> tuple[range, ...]:
    """Cut elements [start, stop) into ``count`` contiguous, aligned slices; the last ones may be empty.

    >>> slices(64, 64 + 192, 2)
    (range(64, 192), range(192, 256))
    """
    step = aligned(-(-(stop - start) // count))
    edges = [min(start + i * step, stop) for i in range(count + 1)]
    return tuple(range(a, b) for a, b in pairwise(edges))


@dataclass(frozen=True, slots=True)
class Part:
    """A subtree that one replica of a host publishes: which, and in which of its workers' buffers."""

    node: Node
    replica: int
    entry: int


@dataclass(frozen=True, slots=True)
class HostShare:
    """What one host contributes to a step.

    Attributes:
        nodes: the maximal subtrees of its micro-batches: the sums that leave it.
        parts: what its replicas publish; they cover the nodes.
    """

    nodes: tuple[Node, ...]
    parts: tuple[Part, ...]


def turns(count: int, hosts: int) -> int:
    """Rounds in which hosts of one worker each take turns with ``count`` micro-batches; in the last, some compute one
    that does not count: parameters that hosts share are brought together by all of them."""
    return -(-count // hosts)


def round_shares(hosts: int, count: int) -> tuple[HostShare, ...]:
    """The shares of hosts of one worker each that take turns: one micro-batch each, then the next.

    >>> [share.nodes for share in round_shares(2, 4)]
    [(Node(level=0, index=0), Node(level=0, index=2)), (Node(level=0, index=1), Node(level=0, index=3))]
    """
    result = []
    for host in range(hosts):
        nodes = tuple(Node(0, m) for m in range(host, turns(count, hosts) * hosts, hosts))
        result.append(HostShare(nodes, tuple(Part(node, 0, number) for number, node in enumerate(nodes))))
    return tuple(result)


def host_shares(hosts: Sequence[int], count: int, shares: Sequence[range] | None = None) -> tuple[HostShare, ...]:
    """The shares of hosts with the given numbers of replicas in ``count`` micro-batches.

    Arguments:
        shares: each replica's, contiguous; default: even ones.

    >>> [share.nodes for share in host_shares([2, 2], 8)]
    [(Node(level=2, index=0),), (Node(level=2, index=1),)]
    """
    shares = shares or micro_batches(count, sum(hosts))
    result = []
    for first, replicas in zip(accumulate([0, *hosts[:-1]]), hosts, strict=True):
        own = shares[first : first + replicas]
        parts = []
        for replica, share in enumerate(own):
            leaves, _ = accumulation(share.start, share.stop, count)
            parts += [Part(leaf.completes[0], replica, leaf.completes[1]) for leaf in leaves if leaf.completes]
        result.append(HostShare(subtrees(own[0].start, own[-1].stop, count), tuple(parts)))
    return tuple(result)
