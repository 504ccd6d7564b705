"""Clients that have data of their own: which of them train in a period, and which of their samples they use.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unisono.run.rng import derive
from unisono.run.sampling import Indices, Sampler, permute


@dataclass(frozen=True, slots=True)
class Federation:
    """All clients of a run.

    Attributes:
        clients: the sample indices of each.
        present: how many of them train in a period.
        period: steps.
        seed: the run's.
    """

    clients: tuple[Indices, ...]
    present: int
    period: int
    seed: int

    def chosen(self, period: int) -> Sequence[int]:
        """The clients that train in a period (from 0): drawn without replacement, each replica's in order.

        >>> both = Federation((np.arange(3), np.arange(3, 4)), present=2, period=5, seed=0)
        >>> sorted(both.chosen(0))
        [0, 1]
        """
        drawn = permute(np.arange(self.present), len(self.clients), derive(self.seed, "clients"), period)
        found: list[int] = drawn.tolist()
        return found

    def weights(self, step: int) -> Sequence[float]:
        """How much what each replica has learned counts in an agreement after ``step`` (from 1): its client's samples'
        share of those of all that have trained."""
        sizes = [len(self.clients[client]) for client in self.chosen((step - 1) // self.period)]
        return [size / sum(sizes) for size in sizes]


@dataclass(frozen=True, slots=True)
class ClientSampler(Sampler):
    """The order in which the clients of a federation use their samples: each goes through its own, in every period by a
    permutation of its own.

    Arguments:
        federation: whose replicas share every step's micro-batches evenly, in order.
    """

    federation: Federation

    def at(self, first: int, count: int) -> Indices:
        """As of `Sampler`."""
        federation, each = self.federation, self.global_batch_size // self.federation.present
        k = np.arange(first, first + count, dtype=np.int64)
        steps, places = k // self.global_batch_size, k % self.global_batch_size
        periods, replicas = steps // federation.period, places // each
        positions = steps % federation.period * each + places % each
        result = np.empty_like(k)
        for period in np.unique(periods):
            chosen = federation.chosen(int(period))
            for replica in np.unique(replicas[periods == period]):
                own = (periods == period) & (replicas == replica)
                client = chosen[int(replica)]
                samples = federation.clients[client]
                seed, size = derive(self.seed, "client", client, int(period)), len(samples)
                for epoch in np.unique(positions[own] // size):
                    now = own & (positions // size == epoch)
                    result[now] = samples[permute(positions[now] % size, size, seed, int(epoch))]
        return result
