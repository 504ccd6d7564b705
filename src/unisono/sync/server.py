"""A parameter server whose servers are parts of the arena: workers read and update them, and wait for nobody.

Every worker computes with values of its own, which it *pulls* from the servers, one after another, and *pushes* the
gradient of each unit of work to each server: the server's runs are updated by whoever pushes, under the server's lock.
What a worker that dies in a push has begun is put back, or counts, run by run; another computes its unit again.

Dean et al., "Large scale distributed deep networks", 2012; Li et al., "Scaling distributed machine learning with the
parameter server", 2014; Ho et al., 2013 (bounded staleness); Zhang et al., "Staleness-aware async-SGD", 2016;
Mitliagkas et al., "Asynchrony begets momentum", 2016.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from unisono.comm.journal import Image
from unisono.comm.locks import Locks
from unisono.errors import GroupError
from unisono.optim.clipping import global_norm, squared_norms
from unisono.plan.assignment import Run
from unisono.plan.pool import Entry, Pool
from unisono.plan.rounds import RoundsPool
from unisono.plan.unit_pool import Words
from unisono.sync.commits import Commits
from unisono.sync.damping import DampedRates
from unisono.sync.divided import OwnedTable, Server
from unisono.sync.messages import Copied
from unisono.sync.ownership import OwnedRun
from unisono.sync.pulled import PulledValues
from unisono.sync.sums import Gradient
from unisono.sync.tables import keep_rows, put_back_rows
from unisono.sync.turns import POOL, lock_of
from unisono.sync.updater import Updater

Change = Callable[[], Callable[[], None]]
"""Prepares a run's change, and returns what does it."""
Commit = Callable[[int], None]
"""Brings a part of a server from a version to the next."""


@dataclass(frozen=True, slots=True)
class Push:
    """What comes to servers with a gradient.

    Attributes:
        unit: whose it is.
        worker: who has computed it.
        read: the version of each server whose values it was computed with.
        factor: by which clipping makes it smaller.
        step: which is under way (from 1).
    """

    unit: int
    worker: int
    read: tuple[int, ...]
    factor: float
    step: int


class Servers:
    """All servers, as one worker sees them.

    Arguments:
        worker: its number in the pool.
        servers: with memory that this worker prepared.
        pool: the step's units; its words say how far each server is, where workers wait for nobody.
        locks: of the pool and of the servers.
        values: what this worker computes with.
        updater: how runs are updated.
        rates: with which.
        commits: how they are committed.

    Attributes:
        parts: the servers.
        updater: see there.
        read: the version of each server that this worker's values are of; -1 where they are of none.
    """

    def __init__(
        self,
        worker: int,
        servers: Sequence[Server],
        pool: Pool | RoundsPool,
        locks: Locks,
        values: PulledValues,
        updater: Updater,
        rates: DampedRates,
        commits: Commits,
    ) -> None:
        self._worker = worker
        self.parts = servers
        self._pool = pool
        self._locks = locks
        self._values = values
        self.updater = updater
        self._rates = rates
        self._commits = commits
        self._journal = commits.journal
        self.read = [-1] * len(servers)
        self.runs = [len(server.images) for server in servers]

    def begin(self, step: int) -> None:
        """Let the pool be that of a step; every server is where its blocks are."""
        self._locks.hold(POOL, f"the pool of step {step}")
        if not self._pool.is_of(step):
            self._pool.begin(step, [self.version_of(number) for number in range(len(self.parts))])
        self._locks.let_go(POOL)

    def end(self, step: int) -> None:
        """Nothing has to be said: blocks' versions are the pushes that they took, at least one a step."""

    def pull_all(self) -> None:
        """Compute with what the servers have, where nobody updates them."""
        for number, server in enumerate(self.parts):
            self._pull(number, server)

    def _pull(self, number: int, server: Server) -> None:
        """Copy what a server has, and of its tables what is not here already."""
        if self.read[number] < 0:
            self._values.pull(server.parts)
            return
        self._values.pull(server.dense)
        for owned in server.tables:
            self._values.pull_rows(owned.table, owned.since(self.read[number]))

    def update_all(
        self,
        versions: Sequence[int],
        busy: Words,
        sums: Gradient,
        factor: float,
        step: int,
        first: int,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Bring every server that is still at the version with which a round began to the next.

        Arguments:
            versions: of each.
            busy: of each, the slot plus 1 of who updates it, or died in that.
            first: the server to begin with; others may begin with others.
            numbers: of the servers; default: all.
        """
        some = range(self.count) if numbers is None else numbers
        turned = first % len(some)
        for number in (*some[turned:], *some[:turned]):
            self._locks.hold(lock_of(number), f"server {number}, to update it")
            version, images = versions[number], self.parts[number].images
            if busy[number]:
                self._recover(int(busy[number]) - 1)
            left = [self._at(image) <= version for image in images]
            if any(left):
                busy[number] = self._commits.slot + 1
                self._rates.set(step, 0)
                for (_, commit), behind in zip(self._changes(number, sums, factor), left, strict=True):
                    if behind:
                        commit(version)
            busy[number] = 0
            self._locks.let_go(lock_of(number))

    def pull(self) -> None:
        """Compute with what the servers have now."""
        for number in range(self.count):
            self.pull_from(number)

    def pull_from(self, number: int) -> None:
        """Compute with what a server has now."""
        self._locks.hold(lock_of(number), f"server {number}, to read it")
        version = self._mended(number)
        if self.read[number] != version:
            self._pull(number, self.parts[number])
            self.read[number] = version
        self._locks.let_go(lock_of(number))

    def copy(self, number: int, since: int) -> tuple[int, Copied | None]:
        """A server's version, and for another worker what changed since one: nothing where that is it.

        Arguments:
            since: -1 for everything.
        """
        server = self.parts[number]
        self._locks.hold(lock_of(number), f"server {number}, to copy it")
        version, found = self._mended(number), None
        if version != since:
            found = Copied(
                self._values.common(server.parts if since < 0 else server.dense),
                [owned.rows_since(since) for owned in server.tables] if since >= 0 else [],
            )
        self._locks.let_go(lock_of(number))
        return version, found

    def _mended(self, number: int) -> int:
        """The version of a server, on which nobody has begun anything any more."""
        if isinstance(self._pool, Pool):
            self._mend(number)
            return int(self._pool.version[number])
        return self.version_of(number)

    def push(self, unit: int, sums: Gradient, factor: float, step: int) -> None:
        """Update every server that does not have all of a unit yet.

        Arguments:
            factor: by which clipping makes its gradient smaller.
            step: which is under way (from 1).
        """
        push = self.push_of(unit, factor, step)
        for number in range(self.count):
            self.take(number, push, sums)

    def push_of(self, unit: int, factor: float, step: int) -> Push:
        """This worker's, with the values that it has."""
        return Push(unit, self._worker, tuple(self.read), factor, step)

    def take(self, number: int, push: Push, sums: Gradient) -> None:
        """Update a server, unless it has all of the unit."""
        pool, server = self._own_pool, self.parts[number]
        for owned in server.tables:
            owned.table.total(sums)  # while nobody waits for it
        self._locks.hold(lock_of(number), f"server {number}, to update it")
        self._mend(number)
        first, version, stop = int(pool.done[push.unit, number]), int(pool.version[number]), len(server.images)
        if first < stop:
            entry = Entry(push.unit, push.worker, first, stop, push.read)
            pool.open_entry(number, entry)
            self.apply(number, entry, version, version - entry.read[number], sums, push.factor, push.step)
            pool.close_entry(number, entry, entry.stop)
        self._locks.let_go(lock_of(number))

    def apply(
        self, number: int, entry: Entry, version: int, late: int, sums: Gradient, factor: float, step: int
    ) -> None:
        """Change a server at ``version`` by a push; runs that it does not change come along.

        Arguments:
            late: how many updates of the server came since it was read.
        """
        self._rates.set(step, late)
        changes = self._changes(number, sums, factor)
        for _, commit in changes[entry.first : entry.stop]:
            commit(version)
        for image, _ in changes[: entry.first] + changes[entry.stop :]:
            self._journal.advance(image, version + 1)

    def _changes(self, number: int, sums: Gradient, factor: float) -> list[tuple[Image, Commit]]:
        """Each member of a server, and what brings it to the next version."""
        server = self.parts[number]
        commits: list[tuple[Image, Commit]] = []
        for member in server.members:
            if isinstance(member, OwnedTable):
                commits.append((member.image, partial(self._commit_rows, member, sums, factor)))
            else:
                change = partial(self._change, member, sums, factor)
                commits.append((member.image, partial(self._commit, member.image, change, sums)))
        if (buffers := server.buffers) is not None:
            of_buffers = lambda: partial(self.updater.update_buffers, buffers, sums)  # noqa: E731
            commits.append((buffers.image, partial(self._commit, buffers.image, of_buffers, sums)))
        return commits

    def _commit(self, image: Image, change: Change, sums: Gradient, version: int) -> None:
        """One run goes from ``version`` to the next; what weighs nothing changes nothing."""
        if sums.weight == 0:
            self._journal.advance(image, version + 1)
        else:
            self._journal.commit(image, version + 1, change())

    def _commit_rows(self, owned: OwnedTable, sums: Gradient, factor: float, version: int) -> None:
        """A table goes from ``version`` to the next, by the rows that have a gradient."""
        table, total = owned.table, owned.table.total(sums)
        if sums.weight == 0 or total is None:
            self._journal.advance(owned.image, version + 1)
            return
        rows, amount = total.indices()[0], -self._rates.of_group(table.group) * factor / sums.weight

        def update() -> None:
            owned.changed[rows.numpy()] = version + 1
            owned.values.index_add_(0, rows, total.values(), alpha=amount)

        undo = self._commits.undo
        self._journal.commit_rows(owned.image, version + 1, lambda: keep_rows(undo, rows, owned.values), update)

    def _change(self, owned: OwnedRun, sums: Gradient, factor: float) -> Callable[[], None]:
        self.updater.reduce(owned, sums)
        self.updater.clip(owned, factor)
        return self.updater.update(owned, sums)

    def _mend(self, number: int) -> None:
        """Put right what a worker has begun on a server, and died in: what it has committed counts."""
        pool = self._own_pool
        entry = pool.opened(number)
        if entry is None:
            return
        if not self._commits.protects:
            raise GroupError(f"a worker of this host was lost as it updated server {number}")
        self._recover(entry.worker)
        images, version = self.parts[number].images, int(pool.version[number])
        at = [self._at(image) for image in images]
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

        def put_back(undo: Tensor, first: int) -> None:
            tables = (owned for server in self.parts for owned in server.tables)
            put_back_rows(undo, next(owned.values for owned in tables if owned.table.first == first))

        self._commits.recover(slot, put_back_rows=put_back)

    def pull_into(self, number: int, values: PulledValues) -> None:
        """Copy what a server has now."""
        values.pull(self.parts[number].parts)

    def version_of(self, number: int) -> int:
        """How far a server's blocks are, where nobody updates it."""
        return self._at(self.parts[number].images[-1])

    def _at(self, image: Image) -> int:
        """The version of a member."""
        return self._commits.at(image.first + image.count - 1)

    def norm(self, sums: Gradient) -> float:
        """The norm of a push's gradient."""
        squares: list[float] = []
        for number, server in enumerate(self.parts):
            squares += [value for _, values in self.squares(number, sums) for value in values]
            for member in server.tables:
                if (total := member.table.total(sums)) is not None:
                    squares += squared_norms([total.values() / sums.weight])
        return global_norm(squares)

    def squares(self, number: int, sums: Gradient) -> Iterator[tuple[Run, list[float]]]:
        """The squared norms of the blocks of each run of a server."""
        for owned in self.parts[number].runs:
            self.updater.reduce(owned, sums)
            yield owned.run, squared_norms(owned.gradients)

    @property
    def _own_pool(self) -> Pool:
        assert isinstance(self._pool, Pool)
        return self._pool

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.parts)

    def rate(self, step: int) -> float:
        """The learning rate in a step, before damping."""
        return self._rates.undamped(step)
