"""Which samples a micro-batch holds: (seed, epoch, step, micro-batch) -> sample indices.

Sample k of a run is ``permutation(seed, k // N)[k % N]``. The permutation is never stored: a Feistel network over the
smallest even number of bits that holds N, walked along its cycle until it lands below N, so a corpus of any
size is shuffled in constant memory and any position is reached directly.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (cycle walking over a Feistel network).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unisono.run.rng import derive

Indices = NDArray[np.int64]

ROUNDS = 6


def _scramble(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, keyed, over an array."""
    value = value + key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(positions: Indices, size: int, seed: int, epoch: int) -> Indices:
    """The images of ``positions`` under the permutation of ``range(size)`` that belongs to (seed, epoch).

    Arguments:
        positions: (n,) integers in [0, size).
        size: number of samples in the dataset, at least 1.

    >>> sorted(permute(np.arange(7), 7, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = [np.uint64(derive(seed, "sampling", epoch, r)) for r in range(ROUNDS)]

    def cipher(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = value >> shift, value & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right, key) & mask)
        return (left << shift) | right

    result = cipher(positions.astype(np.uint64))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = cipher(result[outside])
    return result.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The order in which a run uses the samples of a dataset.

    Arguments:
        size: number of samples in the dataset (N).
        seed: the run's seed.
        global_batch_size: samples in a step.
        micro_batch_size: samples in a micro-batch; divides ``global_batch_size``.
    """

    size: int
    seed: int
    global_batch_size: int
    micro_batch_size: int

    def indices(self, step: int, micro_batch: int) -> Indices:
        """Sample indices, (micro_batch_size,), of one micro-batch; ``step`` counts from 0.

        Batches run across the ends of epochs, so every sample of an epoch is used exactly once.

        >>> Sampler(size=3, seed=0, global_batch_size=2, micro_batch_size=1).indices(0, 1).shape
        (1,)
        """
        return self.at(step * self.global_batch_size + micro_batch * self.micro_batch_size, self.micro_batch_size)

    def at(self, first: int, count: int) -> Indices:
        """Sample indices, (count,), of the run's samples ``first``, ``first + 1``, ...: of any part of the order."""
        k = np.arange(first, first + count, dtype=np.int64)
        epochs, positions = k // self.size, k % self.size
        result = np.empty_like(k)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(positions[chosen], self.size, self.seed, int(epoch))
        return result
