"""Data that several clients have, each its own part: what federated averaging learns from."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from unisono.data.feed import Dataset, draws, size_of
from unisono.errors import ConfigurationError, DataError
from unisono.run.sampling import Indices


class Clients:
    """The datasets of several clients as one.

    Arguments:
        datasets: one a client, of any sizes.

    Attributes:
        clients: the sample indices of each.
        draws: whether reading a sample may draw random numbers.

    >>> both = Clients([[1, 2, 3], [40]])
    >>> len(both), both[3], both.clients
    (4, 40, [range(0, 3), range(3, 4)])
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        sizes = [size_of(dataset, f"client {number}'s") for number, dataset in enumerate(datasets)]
        self.draws = any(map(draws, datasets))
        self._stops = list(accumulate(sizes))
        self.clients = [range(stop - size, stop) for stop, size in zip(self._stops, sizes, strict=True)]

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> Any:
        client = bisect_right(self._stops, index)
        return self._datasets[client][index - self.clients[client].start]


def parts_of(dataset: object, count: int) -> tuple[Indices, ...]:
    """The sample indices of each client: what a dataset says in ``clients``, or else so many even, contiguous parts.

    Raises:
        ConfigurationError: where it says another number of them, or there are more than samples.
        DataError: for a client without samples, or with some that are not there.
    """
    size = size_of(dataset, "training")
    said = getattr(dataset, "clients", None)
    if said is None:
        if count > size:
            raise ConfigurationError(f"sync.clients is {count}, and there are {size} samples; use fewer clients")
        return tuple(np.array_split(np.arange(size, dtype=np.int64), count))
    if len(said) != count:
        raise ConfigurationError(f"sync.clients is {count}, and the dataset has {len(said)} clients; give that number")
    parts = tuple(np.asarray(part, dtype=np.int64) for part in said)
    for number, part in enumerate(parts):
        if not len(part):
            raise DataError(f"client {number} of the dataset has no samples; leave it out")
        if part.min() < 0 or part.max() >= size:
            sample = part.min() if part.min() < 0 else part.max()
            raise DataError(f"client {number} of the dataset has the sample {sample}; there are {size}, from 0")
    return parts
