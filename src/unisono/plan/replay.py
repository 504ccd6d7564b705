"""How a recorded order of pushes is done again by one worker: pure, as a list of things to do.

Every push was computed with values that its worker had read, server by server, at versions that are on record. One
worker can do the same again: it keeps a copy of each server's values at the moment at which someone had read them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unisono.errors import CheckpointError
from unisono.plan.pool import Entry

Attempt = tuple[int, int, tuple[int, ...]]
"""Unit, worker and versions read: what one worker computed, once, and pushed to some servers or all."""


@dataclass(frozen=True, slots=True)
class Read:
    """Copy a server's values as they are now, for an attempt."""

    server: int
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Apply:
    """Change a server by an attempt's gradient, which is computed with what was read for it; ``last``: the attempt is
    over."""

    server: int
    entry: Entry
    attempt: Attempt
    late: int
    last: bool


def replayed(order: Sequence[Sequence[Entry]], base: Sequence[int]) -> Iterator[Read | Apply]:
    """What to do, in an order that leads to the same values.

    Arguments:
        order: the entries of each server.
        base: the version of each as the step began.

    Raises:
        CheckpointError: where no order of doing things agrees with the record.

    >>> entries = [[Entry(0, 0, 0, 1, (0,)), Entry(1, 1, 0, 1, (0,))]]
    >>> [type(action).__name__ for action in replayed(entries, [0])]
    ['Read', 'Read', 'Apply', 'Apply']
    """
    readers: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    left: dict[Attempt, int] = defaultdict(int)
    for entries in order:
        for entry in entries:
            attempt = (entry.unit, entry.worker, entry.read)
            if attempt not in left:
                for server, version in enumerate(entry.read):
                    readers[server, version].append(attempt)
            left[attempt] += 1
    done, missing = [0] * len(order), {attempt: len(order) for attempt in left}

    def read(server: int) -> Iterator[Read]:
        for attempt in readers.get((server, base[server] + done[server]), ()):
            missing[attempt] -= 1
            yield Read(server, attempt)

    for server in range(len(order)):
        yield from read(server)
    while any(number < len(entries) for number, entries in zip(done, order, strict=True)):
        moved = False
        for server, entries in enumerate(order):
            while done[server] < len(entries):
                entry = entries[done[server]]
                attempt = (entry.unit, entry.worker, entry.read)
                if missing[attempt]:
                    break
                left[attempt] -= 1
                late = base[server] + done[server] - entry.read[server]
                yield Apply(server, entry, attempt, late, not left[attempt])
                done[server] += 1
                moved = True
                yield from read(server)
        if not moved:
            raise CheckpointError("the recorded order of pushes contradicts itself; it is damaged")
