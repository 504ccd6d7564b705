"""Where the parts of a parameter server live, and which worker answers for them: pure, the same on all hosts.

A server lives on one host. The workers of that host read and update it in memory that they share; those of others ask
one of them. Or some workers of each host do nothing but answer: then all others ask them, those of their host too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unisono.plan.hosts import Hosts, host_of

POOL_HOST = 0
"""The host whose workers hand out a step's units."""


@dataclass(frozen=True, slots=True)
class Homes:
    """All servers, and all workers.

    Attributes:
        hosts: the workers of each.
        servers: how many there are.
        serving: workers of each host, the last ones, that compute nothing.

    >>> homes = Homes(Hosts((2, 3)), servers=4, serving=1)
    >>> homes.computing, homes.on(1), homes.asked(0), homes.askers(1)
    ((0, 2, 3), [2, 3], (1, 4), (0, 2, 3))
    """

    hosts: Hosts
    servers: int
    serving: int = 0

    @property
    def spread(self) -> bool:
        """Whether some who compute do not reach all servers."""
        return len(self.hosts.sizes) > 1 or self.serving > 0

    def on(self, host: int) -> list[int]:
        """The servers that live on a host."""
        count = len(self.hosts.sizes)
        return [server for server in range(self.servers) if host_of(server, self.servers, count) == host]

    def serves(self, rank: int) -> bool:
        """Whether a worker computes nothing."""
        host, local_rank = self.hosts.place(rank)
        return local_rank >= self.hosts.sizes[host] - self.serving

    @property
    def computing(self) -> tuple[int, ...]:
        """Workers that do not only answer."""
        return tuple(rank for rank in range(self.hosts.size) if not self.serves(rank))

    def reaches(self, rank: int, host: int) -> bool:
        """Whether a worker reads and updates a host's servers itself."""
        return self.hosts.place(rank)[0] == host and (not self.serving or self.serves(rank))

    def asked(self, rank: int) -> tuple[int, ...]:
        """The workers that one asks: of each host whose servers it does not reach, one.

        Several that ask a host ask different ones where there are more.
        """
        return () if self.serves(rank) else self._one_of_each(rank)

    def peers(self, rank: int) -> tuple[int, ...]:
        """Of each other host one, for a worker that updates its own host's servers."""
        return self._one_of_each(rank) if self.reaches(rank, self.hosts.place(rank)[0]) else ()

    def askers(self, rank: int) -> tuple[int, ...]:
        """The workers that ask this one."""
        return tuple(other for other in range(self.hosts.size) if rank in self.asked(other))

    def _one_of_each(self, rank: int) -> tuple[int, ...]:
        host, local_rank = self.hosts.place(rank)
        others = [other for other in range(len(self.hosts.sizes)) if not self.reaches(rank, other)]
        return tuple(self._answering(other)[(host + local_rank) % len(self._answering(other))] for other in others)

    def _answering(self, host: int) -> Sequence[int]:
        ranks = [self.hosts.rank(host, n) for n in range(self.hosts.sizes[host])]
        return [rank for rank in ranks if self.serves(rank)] if self.serving else ranks
