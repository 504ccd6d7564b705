"""A parameter server whose servers are parts of the arena: workers read and update them, and wait for nobody.

Every worker computes with values of its own, which it *pulls* from the servers, one after another, and *pushes* the
gradient of each unit of work to each server: the server's runs are updated by whoever pushes, under the server's lock.
What a worker that dies in a push has begun is put back, or counts, run by run; another computes its unit again.

Dean et al., "Large scale distributed deep networks", 2012; Li et al., "Scaling distributed machine learning with the
parameter server", 2014; Ho et al., 2013 (bounded staleness); Zhang et al., "Staleness-aware async-SGD", 2016;
Mitliagkas et al., "Asynchrony begets momentum", 2016.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unisono.comm.journal import Image, Journal
from unisono.comm.locks import Locks
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.clipping import global_norm, squared_norms
from unisono.optim.schedules import Schedule
from unisono.plan.assignment import Run, UpdateClass, contiguous_shares, runs
from unisono.plan.pool import Entry, Pool
from unisono.plan.rounds import RoundsPool
from unisono.plan.unit_pool import Words
from unisono.state.layout import StateLayout
from unisono.sync.ownership import OwnedBuffers, OwnedRun, Owner, RunMemory
from unisono.sync.pulled import PulledValues
from unisono.sync.sums import StepSums
from unisono.sync.tables import Table, keep_rows, members, put_back_rows
from unisono.sync.updater import Updater

Change = Callable[[], Callable[[], None]]
"""Prepares a run's change, and returns what does it."""
Commit = Callable[[int], None]
"""Brings a part of a server from a version to the next."""
POOL = 0
"""The number of the pool's lock; those of servers follow."""


@dataclass(frozen=True, slots=True)
class OwnedTable:
    """A table, as one worker updates it.

    Attributes:
        image: by which its blocks are known; old rows are kept as rows.
        values: (rows, ...), in the state.
        changed: the version of its server since which each row is as it is.
    """

    table: Table
    image: Image
    values: Tensor
    changed: Words

    def since(self, version: int) -> Tensor:
        """The rows that were changed after a version."""
        return torch.from_numpy(np.flatnonzero(self.changed > version))


@dataclass(frozen=True, slots=True)
class Server:
    """A part of the state with a lock and a version of its own.

    Attributes:
        members: its runs of parameters, each updated as one, and tables.
        buffers: of the model, on one of the servers, where there are any.
    """

    members: Sequence[OwnedRun | OwnedTable]
    buffers: OwnedBuffers | None

    @property
    def runs(self) -> list[OwnedRun]:
        """Those of its members that are."""
        return [member for member in self.members if isinstance(member, OwnedRun)]

    @property
    def tables(self) -> list[OwnedTable]:
        """Those of its members that are."""
        return [member for member in self.members if isinstance(member, OwnedTable)]

    @property
    def images(self) -> list[Image]:
        """The memory of its members; the buffers' is the last."""
        return [member.image for member in self.members] + ([self.buffers.image] if self.buffers is not None else [])

    @property
    def parts(self) -> list[Run]:
        """Its members as runs, the buffers' among them."""
        return [_run(image) for image in self.images]

    @property
    def dense(self) -> list[Run]:
        """The same without tables."""
        apart = {owned.table.first for owned in self.tables}
        return [run for run in self.parts if run.first not in apart]


def _run(image: Image) -> Run:
    return Run(image.first, image.first + image.count)


class Servers:
    """All servers, as one worker sees them.

    Arguments:
        slot: of the worker.
        servers: with memory that this worker prepared.
        pool: the step's units; its words say how far each server is, where workers wait for nobody.
        locks: of the pool and of the servers.
        values: what this worker computes with.
        updater, optimizer: how runs are updated.
        rate: the schedule, and the factor of the batch size.
        damping: what is lower the staler a push is: "none", "rate", "momentum" or "both".
        versions: one word a block.
        row, memory: of a slot: its words, and where runs lie with its undo area.
    """

    def __init__(
        self,
        slot: int,
        servers: Sequence[Server],
        pool: Pool | RoundsPool,
        locks: Locks,
        values: PulledValues,
        updater: Updater,
        optimizer: BlockOptimizer,
        rate: tuple[Schedule, float],
        damping: str,
        versions: memoryview,
        row: Callable[[int], memoryview],
        memory: Callable[[int], RunMemory],
        *,
        protects: bool,
    ) -> None:
        self._slot = slot
        self._servers = servers
        self._pool = pool
        self._locks = locks
        self._values = values
        self._updater = updater
        self._optimizer = optimizer
        self._rate = rate
        self._damps = [name for name in ("rate", "momentum") if damping in (name, "both")]
        self._versions = versions
        self._row = row
        self._memory = memory
        self._journal = Journal(row(slot), versions, protects=protects)
        self._read = [-1] * len(servers)
        self.runs = [len(server.images) for server in servers]

    def begin(self, step: int) -> None:
        """Let the pool be that of a step; every server is where its blocks are."""
        self._locks.hold(POOL, f"the pool of step {step}")
        if not self._pool.is_of(step):
            self._pool.begin(step, [self.version_of(number) for number in range(len(self._servers))])
        self._locks.let_go(POOL)

    def end(self, step: int) -> None:
        """Nothing has to be said: blocks' versions are the pushes that they took, at least one a step."""

    def pull_all(self) -> None:
        """Compute with what the servers have, where nobody updates them."""
        for number, server in enumerate(self._servers):
            self._pull(number, server)

    def _pull(self, number: int, server: Server) -> None:
        """Copy what a server has, and of its tables what is not here already."""
        if self._read[number] < 0:
            self._values.pull(server.parts)
            return
        self._values.pull(server.dense)
        for owned in server.tables:
            self._values.pull_rows(owned.table, owned.since(self._read[number]))

    def update_all(
        self, versions: Sequence[int], busy: Words, sums: StepSums, factor: float, step: int, first: int
    ) -> None:
        """Bring every server that is still at the version with which a round began to the next.

        Arguments:
            versions: of each.
            busy: of each, the slot plus 1 of who updates it, or died in that.
            first: the server to begin with; others may begin with others.
        """
        count = len(self._servers)
        for number in (*range(first % count, count), *range(first % count)):
            self._locks.hold(1 + number, f"server {number}, to update it")
            version, images = versions[number], self._servers[number].images
            if busy[number]:
                self._recover(int(busy[number]) - 1)
            left = [self._versions[image.first + image.count - 1] <= version for image in images]
            if any(left):
                busy[number] = self._slot + 1
                self._set_rate(step, 0)
                for (_, commit), behind in zip(self._changes(number, sums, factor), left, strict=True):
                    if behind:
                        commit(version)
            busy[number] = 0
            self._locks.let_go(1 + number)

    def pull(self) -> None:
        """Compute with what the servers have now."""
        pool = self._own_pool
        for number, server in enumerate(self._servers):
            self._locks.hold(1 + number, f"server {number}, to read it")
            self._mend(number)
            if self._read[number] != pool.version[number]:
                self._pull(number, server)
                self._read[number] = int(pool.version[number])
            self._locks.let_go(1 + number)

    def push(self, unit: int, sums: StepSums, factor: float, step: int) -> None:
        """Update every server that does not have all of a unit yet.

        Arguments:
            factor: by which clipping makes its gradient smaller.
            step: which is under way (from 1).
        """
        for number, server in enumerate(self._servers):
            for owned in server.tables:
                owned.table.total(sums)  # while nobody waits for it
            self._locks.hold(1 + number, f"server {number}, to update it")
            self._mend(number)
            self._update(number, server, unit, sums, factor, step)
            self._locks.let_go(1 + number)

    def _update(self, number: int, server: Server, unit: int, sums: StepSums, factor: float, step: int) -> None:
        pool, images = self._own_pool, server.images
        first, version = int(pool.done[unit, number]), int(pool.version[number])
        if first == len(images):
            return
        entry = Entry(unit, self._slot, first, len(images), tuple(self._read))
        pool.open_entry(number, entry)
        self.apply(number, entry, version, version - entry.read[number], sums, factor, step)
        pool.close_entry(number, entry, entry.stop)

    def apply(
        self, number: int, entry: Entry, version: int, late: int, sums: StepSums, factor: float, step: int
    ) -> None:
        """Change a server at ``version`` by a push; runs that it does not change come along.

        Arguments:
            late: how many updates of the server came since it was read.
        """
        self._set_rate(step, late)
        changes = self._changes(number, sums, factor)
        for _, commit in changes[entry.first : entry.stop]:
            commit(version)
        for image, _ in changes[: entry.first] + changes[entry.stop :]:
            self._journal.advance(image, version + 1)

    def _changes(self, number: int, sums: StepSums, factor: float) -> list[tuple[Image, Commit]]:
        """Each member of a server, and what brings it to the next version."""
        server = self._servers[number]
        commits: list[tuple[Image, Commit]] = []
        for member in server.members:
            if isinstance(member, OwnedTable):
                commits.append((member.image, partial(self._commit_rows, member, sums, factor)))
            else:
                change = partial(self._change, member, sums, factor)
                commits.append((member.image, partial(self._commit, member.image, change, sums)))
        if (buffers := server.buffers) is not None:
            of_buffers = lambda: partial(self._updater.update_buffers, buffers, sums)  # noqa: E731
            commits.append((buffers.image, partial(self._commit, buffers.image, of_buffers, sums)))
        return commits

    def _commit(self, image: Image, change: Change, sums: StepSums, version: int) -> None:
        """One run goes from ``version`` to the next; what weighs nothing changes nothing."""
        if sums.weight == 0:
            self._journal.advance(image, version + 1)
        else:
            self._journal.commit(image, version + 1, change())

    def _commit_rows(self, owned: OwnedTable, sums: StepSums, factor: float, version: int) -> None:
        """A table goes from ``version`` to the next, by the rows that have a gradient."""
        table, total = owned.table, owned.table.total(sums)
        if sums.weight == 0 or total is None:
            self._journal.advance(owned.image, version + 1)
            return
        rows, amount = total.indices()[0], -self._optimizer.rate_of(table.group) * factor / sums.weight

        def update() -> None:
            owned.changed[rows.numpy()] = version + 1
            owned.values.index_add_(0, rows, total.values(), alpha=amount)

        undo = self._memory(self._slot).undo
        self._journal.commit_rows(owned.image, version + 1, lambda: keep_rows(undo, rows, owned.values), update)

    def _change(self, owned: OwnedRun, sums: StepSums, factor: float) -> Callable[[], None]:
        self._updater.reduce(owned, sums)
        self._updater.clip(owned, factor)
        return self._updater.update(owned, sums)

    def _set_rate(self, step: int, late: int) -> None:
        """The rate and the momentum of a push whose values ``late`` updates have made old.

        Damped, the rate is divided by 1 + late. Updates that come late have a momentum of their own, 1 - 1/(1 + late)
        where that is so of all; damped, the optimizer's is less by as much.
        """
        schedule, scale = self._rate
        self._optimizer.set_rate(schedule, scale / (1 + late) if "rate" in self._damps else scale, step - 1)
        if "momentum" in self._damps:
            self._optimizer.lower_momentum(late / (1 + late))

    def _mend(self, number: int) -> None:
        """Put right what a worker has begun on a server, and died in: what it has committed counts."""
        pool = self._own_pool
        entry = pool.opened(number)
        if entry is None:
            return
        self._recover(entry.slot)
        images, version = self._servers[number].images, int(pool.version[number])
        at = [self._versions[image.first + image.count - 1] for image in images]
        stop = entry.first
        while stop < entry.stop and at[stop] > version:
            stop += 1
        if stop > entry.first:
            pool.shorten(number, stop)  # for whoever goes on where this worker dies too
            for image, own in zip(images, at, strict=True):
                if own <= version:
                    self._journal.advance(image, version + 1)
        pool.close_entry(number, entry, stop)

    def _recover(self, slot: int) -> None:
        """Put back what the worker of a slot was changing when it died."""
        memory = self._memory(slot)

        def image_of(first: int, count: int, column: bool) -> Image:
            return memory.image(Run(first, first + count), column=column)

        def put_back(first: int) -> None:
            tables = (owned for server in self._servers for owned in server.tables)
            put_back_rows(memory.undo, next(owned.values for owned in tables if owned.table.first == first))

        Journal(self._row(slot), self._versions).recover(image_of, put_back_rows=put_back)

    def pull_into(self, number: int, values: PulledValues) -> None:
        """Copy what a server has now."""
        values.pull(self._servers[number].parts)

    def version_of(self, number: int) -> int:
        """How far a server's blocks are, where nobody updates it."""
        return self._versions[self._servers[number].parts[-1].stop - 1]

    def norm(self, sums: StepSums) -> float:
        """The norm of a push's gradient."""
        squares: list[float] = []
        for server in self._servers:
            for owned in server.runs:
                self._updater.reduce(owned, sums)
                squares += squared_norms(owned.gradients)
            for member in server.tables:
                if (total := member.table.total(sums)) is not None:
                    squares += squared_norms([total.values() / sums.weight])
        return global_norm(squares)

    @property
    def _own_pool(self) -> Pool:
        assert isinstance(self._pool, Pool)
        return self._pool

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._servers)

    def rate(self, step: int) -> float:
        """The learning rate in a step, before damping."""
        self._set_rate(step, 0)
        return self._optimizer.learning_rate


def divided(
    layout: StateLayout, update: UpdateClass, count: int, most: int, tables: Sequence[Table]
) -> list[Sequence[Run]]:
    """A state's runs, divided among servers about evenly; as many as are wanted, or as there are runs for.

    Arguments:
        most: elements of a run.
        tables: each is a run of its own.
    """
    blocks, apart = layout.flat.blocks, members(tables)
    dense = runs(layout.flat, update, [block for block in range(len(blocks)) if block not in apart], most)
    everything = sorted([*dense, *(Run(table.first, table.stop) for table in tables)], key=lambda run: run.first)
    costs = [sum(b.stop - b.start for b in blocks[run.first : run.stop]) for run in everything]
    shares = contiguous_shares(costs, min(count, len(everything)))
    return [everything[share.start : share.stop] for share in shares if share]


def servers_of(
    parts: Sequence[Sequence[Run]],
    owner: Owner,
    optimizer: BlockOptimizer,
    tables: Sequence[Table],
    changed: Words,
) -> list[Server]:
    """Servers over a worker's memory; the buffers are the first one's.

    Arguments:
        tables: those of the runs that are.
        changed: of each row of all tables.
    """
    buffers, values = owner.prepare_buffers(), owner.state.values
    stops = list(itertools.accumulate(len(values[table.parameter]) for table in tables))
    owned = {
        table.first: OwnedTable(
            table,
            Image(table.first, table.stop - table.first, (), (), ()),
            values[table.parameter],
            changed[stop - len(values[table.parameter]) : stop],
        )
        for table, stop in zip(tables, stops, strict=True)
    }

    def members_of(part: Sequence[Run]) -> list[OwnedRun | OwnedTable]:
        dense = iter(owner.prepare([run for run in part if run.first not in owned], optimizer))
        return [owned[run.first] if run.first in owned else next(dense) for run in part]

    return [Server(members_of(part), None if number else buffers) for number, part in enumerate(parts)]
