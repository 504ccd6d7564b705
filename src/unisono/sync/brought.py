"""The gradients that count in a round, as far as a host's servers need them: brought by its workers, and by others.

Whoever brings the last one that is missing on a host brings that host's servers to the end of the round.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unisono.comm.arena import Region
from unisono.comm.locks import Locks
from unisono.comm.partial import Partial
from unisono.comm.patience import GRACE_S
from unisono.comm.waiting import Waiter
from unisono.errors import TrainingError
from unisono.plan.assignment import Run
from unisono.plan.blocks import FlatLayout, aligned
from unisono.plan.rounds import Arrival, RoundsPool
from unisono.state.portions import merged
from unisono.sync.turns import POOL

BRING = "bring"
"""What is asked of another host."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one host's servers need of a partial.

    Attributes:
        ranges: (segment, start, stop) in elements of gradients.
        buffers: the model's too.
    """

    ranges: Sequence[tuple[int, int, int]]
    buffers: bool

    @classmethod
    def of(cls, flat: FlatLayout, servers: Sequence[Sequence[Run]], *, buffers: bool) -> "Need":
        """That of some servers.

        Arguments:
            servers: the runs of each.
        """
        blocks = [block for runs in servers for run in runs for block in flat.blocks[run.first : run.stop]]
        found: dict[int, list[Region]] = {}
        for use, (_, parameter) in enumerate(flat.uses):
            place = flat.use_places[use]
            for block in blocks:
                if block.parameter == parameter:
                    region = Region(place.offset + block.start, aligned(block.stop - block.start))
                    found.setdefault(place.segment, []).append(region)
        ranges = [
            (segment, region.offset, region.offset + region.size_bytes)
            for segment, regions in sorted(found.items())
            for region in merged(regions)
        ]
        return cls(ranges, buffers)

    def views(self, partial: Partial) -> Iterator[Tensor]:
        """What that is of a partial."""
        yield torch.frombuffer(partial.scalars, dtype=torch.float64)
        yield torch.frombuffer(partial.counts, dtype=torch.int32)
        for segment, start, stop in self.ranges:
            yield partial.segments[segment][start:stop]
        if self.buffers:
            yield from partial.entries[partial.uses :]

    def put(self, partial: Partial, data: Tensor) -> None:
        """Take what `views` gave elsewhere."""
        at = 0
        for view in self.views(partial):
            stop = at + view.nbytes
            if view.numel():
                view.reshape(-1).view(torch.uint8).copy_(data[at:stop])
            at = stop


@dataclass(slots=True)
class Brought:
    """Those of one host, as one worker and its threads see them.

    Attributes:
        pool: this host's: in each round, the units that count, and where their gradients lie.
        locks: of the pool.
        need: this host's.
        slot: of the worker.
        view: (slot, entry) -> a partial.
        first: the worker's first buffer for what others bring.
        late: who is, for errors; empty where another host knows, whose error is to come first.
    """

    pool: RoundsPool
    locks: Locks
    need: Need
    slot: int
    view: Callable[[int, int], Partial]
    first: int
    late: Callable[[], str] | None
    _used: tuple[tuple[int, int], int] = ((0, 0), 0)  # of a round, how many of them
    _using: threading.Lock = field(default_factory=threading.Lock)

    def receive(self, step: int, number: int, unit: int, data: Tensor) -> bool:
        """Another host's worker brings a unit; whether the round is whole here."""
        with self._using:
            of, used = self._used
            used = used if of == (step, number) else 0
            self._used = (step, number), used + 1
        entry = self.first + used
        self.need.put(self.view(self.slot, entry), data)
        return self.bring(step, number, unit, entry)

    def bring(self, step: int, number: int, unit: int, entry: int) -> bool:
        """A unit that counts lies in one of this worker's buffers; whether the round is whole here.

        Raises:
            TrainingError: where it is not awaited.
        """
        with self.locks.held(POOL, f"the pool of step {step}"):
            if not self.pool.arrive(number, Arrival(unit, self.slot, entry)):
                raise TrainingError(
                    f"unit {unit} counts in round {number} of step {step}, where this host is in round "
                    f"{self.pool.round}; this is a defect of Unisono"
                )
            return self.pool.is_closed(number)

    def partials(self, number: int) -> list[Partial]:
        """Those of a round that is whole."""
        return [self.view(arrival.slot, arrival.entry) for arrival in self.pool.arrivals(number)]

    def end(self, step: int, number: int, loss: float, weight: float) -> None:
        """This host's servers are at the end of a round."""
        with self.locks.held(POOL, f"the pool of step {step}"):
            self.pool.end(number, loss, weight)

    def wait(self, step: int, number: int, waiter: Waiter) -> None:
        """Wait until this host's servers are where a round begins."""
        pool = self.pool

        def ready() -> bool | None:
            return True if pool.is_of(step) and pool.round >= number else None

        def progress() -> tuple[int, int]:
            now = min(pool.round, pool.layout.rounds - 1)
            return now, len(pool.arrivals(now))

        def late() -> str:
            now, come = progress()
            what = f"{come} of {pool.needed(now)} gradients that count in round {now} have come to this host"
            return what if self.late is None else f"{what}; {self.late()}"

        if self.late is None:
            waiter = replace(waiter, deadline_s=waiter.deadline_s + GRACE_S)
        waiter(ready, f"round {number} of step {step}", late, progress)
