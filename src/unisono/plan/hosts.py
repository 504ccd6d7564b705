"""Which worker is on which host: world ranks run through the hosts one after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of a run.

    Attributes:
        sizes: workers on each host, in order.
        names: their numbers, where some are missing; empty where none is.

    >>> hosts = Hosts((2, 3))
    >>> hosts.size, hosts.place(3), hosts.rank(1, 1), hosts.lanes
    (5, (1, 1), 3, 2)
    """

    sizes: tuple[int, ...]
    names: tuple[int, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Hosts":
        """From what `written` gives.

        >>> Hosts.read("2,3"), Hosts.read(Hosts((2, 3), (0, 4)).written())
        (Hosts(sizes=(2, 3), names=()), Hosts(sizes=(2, 3), names=(0, 4)))
        """
        names, _, sizes = text.rpartition("=")
        return cls(*(tuple(map(int, some.split(","))) if some else () for some in (sizes, names)))

    def written(self) -> str:
        """As a word: the sizes, and the names before them where there are any."""
        sizes, names = (",".join(map(str, some)) for some in (self.sizes, self.names))
        return f"{names}={sizes}" if names else sizes

    @property
    def numbers(self) -> tuple[int, ...]:
        """By which hosts are known, whoever else is there."""
        return self.names or tuple(range(len(self.sizes)))

    @property
    def size(self) -> int:
        """Workers in all."""
        return sum(self.sizes)

    @property
    def lanes(self) -> int:
        """Local ranks that every host has: those that exchange with their like on other hosts."""
        return min(self.sizes)

    def rank(self, host: int, local_rank: int) -> int:
        """The world rank of a host's worker."""
        return sum(self.sizes[:host]) + local_rank

    def place(self, rank: int) -> tuple[int, int]:
        """(host, local rank) of a world rank."""
        host = 0
        while rank >= self.sizes[host]:
            rank -= self.sizes[host]
            host += 1
        return host, rank

    def name(self, rank: int) -> str:
        """A rank for a reader, with its host where there are several.

        >>> Hosts((2, 3)).name(3)
        'rank 3 (host 1)'
        """
        several = len(self.sizes) > 1 or self.names
        return f"rank {rank} (host {self.numbers[self.place(rank)[0]]})" if several else f"rank {rank}"


def host_of(number: int, count: int, hosts: int) -> int:
    """The host of one of ``count`` things, from 0: each has about as many, whatever workers it has.

    >>> [host_of(number, 5, 2) for number in range(5)]
    [0, 0, 0, 1, 1]
    """
    return number * hosts // count


def evenly(workers: int, hosts: int, together: int = 1) -> tuple[int, ...]:
    """``workers`` over ``hosts``, the first ones with more where it does not divide.

    Arguments:
        together: workers that stay on one host.

    >>> evenly(5, 2), evenly(6, 2, together=2)
    ((3, 2), (4, 2))
    """
    if workers % together:
        raise ValueError(f"{workers} workers are no groups of {together}")
    each, more = divmod(workers // together, hosts)
    return tuple((each + (i < more)) * together for i in range(hosts))


@dataclass(frozen=True, slots=True)
class Place:
    """Where this worker stands.

    Attributes:
        hosts: all of them.
        rank: this worker's world rank.
    """

    hosts: Hosts
    rank: int

    @property
    def host(self) -> int:
        """This worker's host."""
        return self.hosts.place(self.rank)[0]

    @property
    def local_rank(self) -> int:
        """This worker's number on its host."""
        return self.hosts.place(self.rank)[1]

    def among(self, slots: Mapping[int, Sequence[int]]) -> "Place":
        """This worker's place where only some workers of some hosts are there.

        Arguments:
            slots: the local ranks of each host's, in order of host.

        >>> place = Place(Hosts((2, 1, 2)), 4).among({0: [0, 1], 2: [1]})
        >>> place.rank, place.host, place.hosts.name(place.rank)
        (2, 1, 'rank 2 (host 2)')
        """
        some = Hosts(tuple(map(len, slots.values())), tuple(slots))
        return Place(some, some.rank(list(slots).index(self.host), slots[self.host].index(self.local_rank)))

    def local_name(self, local_rank: int) -> str:
        """A worker of this host, for a reader."""
        return self.hosts.name(self.hosts.rank(self.host, local_rank))
