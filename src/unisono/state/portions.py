"""Which bytes of a training state each of the hosts that share it keeps, and from where others get what they need."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from unisono.comm.arena import Region
from unisono.plan.assignment import Run
from unisono.plan.shards import StateShards
from unisono.state.layout import StateLayout


@dataclass(frozen=True, slots=True, order=True)
class Portion:
    """What host ``number`` of ``hosts`` that share a state keeps of it; where each has all of it, that is one portion.

    >>> Portion(1, 3).name, Portion.named("1 of 3"), Portion(0, 3).before
    ('1 of 3', Portion(number=1, hosts=3), Portion(number=2, hosts=3))
    """

    number: int = 0
    hosts: int = 1

    @property
    def name(self) -> str:
        """For a message."""
        return f"{self.number} of {self.hosts}"

    @classmethod
    def named(cls, name: str) -> "Portion":
        """From a message."""
        number, _, hosts = name.partition(" of ")
        return cls(int(number), int(hosts))

    @property
    def before(self) -> "Portion":
        """The neighbour's, of which this one's host keeps a copy."""
        return Portion((self.number - 1) % self.hosts, self.hosts)


@dataclass(frozen=True, slots=True)
class Move:
    """A range of a state that one host has in an image of a portion, and another needs."""

    portion: int
    source: int
    target: int
    region: Region


def portions(layout: StateLayout, size_bytes: int, shards: StateShards | None) -> list[list[Region]]:
    """Divide all bytes of a state: each host's blocks; the first has whatever belongs to no block.

    Arguments:
        shards: None where each host has all of it.
    """
    whole = Region(0, size_bytes)
    if shards is None:
        return [[whole]]
    divided = [_blocks(layout, shards, host) for host in range(shards.hosts)]
    divided[0] = merged([*divided[0], *_gaps(whole, divided)])
    return divided


def needed(layout: StateLayout, size_bytes: int, shards: StateShards | None, host: int) -> list[Region]:
    """What a host must have of a state to train."""
    if shards is None:
        return [Region(0, size_bytes)]
    own, named = [_blocks(layout, shards, other) for other in range(shards.hosts)], layout.regions.named
    everywhere = [named["scalars"], *_gaps(Region(0, size_bytes), own)]
    if not shards.values:
        everywhere += [region for name, region in named.items() if name.startswith("values ")]
    return merged([*own[host], *everywhere])


def moves(
    divided: Sequence[Sequence[Region]], holders: Mapping[int, Sequence[int]], needs: Sequence[Sequence[Region]]
) -> Iterator[Move]:
    """How every host gets what it needs, from its own memory where that has it; the same on all.

    Arguments:
        divided: the portions of a state.
        holders: of each portion, the hosts that have an image of it.
        needs: of each host.
    """
    for portion, regions in enumerate(divided):
        for target, wanted in enumerate(needs):
            source = target if target in holders[portion] else holders[portion][0]
            for region in intersection(regions, wanted):
                yield Move(portion, source, target, region)


def place_in(regions: Sequence[Region], inner: Region) -> int:
    """Where a range lies when these regions are put one behind the other.

    >>> place_in([Region(0, 10), Region(64, 10)], Region(66, 4))
    12
    """
    before = 0
    for region in regions:
        if region.offset <= inner.offset < region.offset + region.size_bytes:
            return before + inner.offset - region.offset
        before += region.size_bytes
    raise ValueError(f"{inner} lies in none of {len(regions)} regions")


def overlap(a: Region, b: Region) -> Region | None:
    """What two regions have in common."""
    start, stop = max(a.offset, b.offset), min(a.offset + a.size_bytes, b.offset + b.size_bytes)
    return Region(start, stop - start) if stop > start else None


def intersection(some: Sequence[Region], others: Sequence[Region]) -> Iterator[Region]:
    """What regions of either kind have in common; both are in order, and none overlaps another of its kind."""
    i = j = 0
    while i < len(some) and j < len(others):
        if (common := overlap(some[i], others[j])) is not None:
            yield common
        if some[i].offset + some[i].size_bytes <= others[j].offset + others[j].size_bytes:
            i += 1
        else:
            j += 1


def merged(regions: Sequence[Region]) -> list[Region]:
    """Regions in order, those that touch as one.

    >>> merged([Region(64, 8), Region(0, 4), Region(4, 4)])
    [Region(offset=0, size_bytes=8), Region(offset=64, size_bytes=8)]
    """
    result: list[Region] = []
    for region in sorted(regions, key=lambda region: region.offset):
        last = result[-1] if result else None
        if last is not None and region.offset <= last.offset + last.size_bytes:
            stop = max(last.offset + last.size_bytes, region.offset + region.size_bytes)
            result[-1] = Region(last.offset, stop - last.offset)
        else:
            result.append(region)
    return result


def _blocks(layout: StateLayout, shards: StateShards, host: int) -> list[Region]:
    return merged([region for i in shards.blocks(host) for region in layout.image(Run(i, i + 1)) if region.size_bytes])


def _gaps(whole: Region, divided: Sequence[Sequence[Region]]) -> list[Region]:
    """What is in none of the regions."""
    result, at = [], whole.offset
    for region in merged([region for regions in divided for region in regions]):
        if region.offset > at:
            result.append(Region(at, region.offset - at))
        at = region.offset + region.size_bytes
    if at < whole.offset + whole.size_bytes:
        result.append(Region(at, whole.offset + whole.size_bytes - at))
    return result
