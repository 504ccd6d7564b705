"""Which worker this process is: read from the environment, once, and passed on."""

import functools
import os
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unisono.errors import LaunchError, RunOver
from unisono.launch.control import (
    ADDRESS,
    BEFORE,
    CONTROL,
    GENERATION,
    HOSTS,
    JOINS,
    MEMBERS,
    ROLLED_BACK,
    RUN_DIR,
    SPANS,
    Message,
    receive,
    send,
)
from unisono.launch.keeper import CONNECT_DEADLINE_S, connect
from unisono.plan.hosts import Hosts

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


SNAPSHOTS = "snapshots "
"""What the names of their arenas begin with."""


@dataclass(slots=True)
class World:
    """A worker's place among all workers of the run, and its line to whoever keeps the arena.

    Attributes:
        rank: this worker's number.
        hosts: the workers of each host.
        control: the line; None for a world of one.
        launcher: "unisono", "torchrun" or "python".
        address: of this host, as other hosts reach it; None for the one that its name resolves to.
        members: workers of this host that begin; there is room for more (`local_size`), who may join later.
        present: local ranks of those who begin this training.
        joins: this worker, or its host, joins those who train already.
        spans: every host has a launcher of its own.
        rolled_back: the step that was committed when a worker was lost, where all start again from a snapshot.
        generation: of the hosts that start together; it grows where all start again.
        before: the numbers of the hosts that trained before these; empty where none did.
        run_dir: where records go, in place of what is configured here; None for that.
    """

    rank: int
    hosts: Hosts
    control: socket.socket | None
    launcher: str
    address: str | None = None
    members: int | None = None
    joins: bool = False
    spans: bool = False
    rolled_back: int | None = None
    generation: int = 1
    before: tuple[int, ...] = ()
    run_dir: str | None = None
    present: tuple[int, ...] = ()
    _arenas: int = 0
    _snapshots: set[str] = field(default_factory=set)
    _place: str = ""
    _store: "Store | None" = None
    _asking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> int:
        """Workers on all hosts."""
        return self.hosts.size

    @property
    def beginning(self) -> Hosts:
        """The workers of each host that begin."""
        return self.hosts if self.members is None or len(self.hosts.sizes) > 1 else Hosts((self.members,))

    @property
    def host(self) -> int:
        """The number of this worker's host."""
        return self.hosts.place(self.rank)[0]

    @property
    def local_rank(self) -> int:
        """This worker's number on its host."""
        return self.hosts.place(self.rank)[1]

    @property
    def local_size(self) -> int:
        """Workers that this host has room for."""
        return self.hosts.sizes[self.host]

    def begin_training(self) -> None:
        """A training begins: find out who takes part, and whether this worker comes later than others.

        In a later training of the same program all who are there begin together.
        """
        self._arenas += 1
        self.joins = self.joins and self._arenas == 1
        self.rolled_back = self.rolled_back if self._arenas == 1 else None
        if self.launcher == "unisono" and not self.joins:
            present = self._ask({"op": "present", "training": self._arenas})[0]["present"]
            self.present = tuple(n for n in present if n < self.local_size)
        else:
            self.present = tuple(range(self.local_size))

    def arena(
        self, size_bytes: int, *, own: bool = False, alone: bool = False, rules: Mapping[str, Any] | None = None
    ) -> int | None:
        """The descriptor of the next arena, the same for all workers of a host; None where memory is not shared.

        Arguments:
            own: each worker has one of its own.
            alone: this worker shares its memory with nobody, its launcher neither.
            rules: what the launcher is to do about lost workers (see `fault.rules.Rules`); None for ending the run.

        Raises:
            LaunchError: where it cannot be had.
            RunOver: where that training is over.
        """
        if alone or (self.local_size == 1 and rules is None):
            return None
        self._place = f"worker {self.rank}" if own else f"host {self.host}"
        first = self.rank if own else self.hosts.rank(self.host, 0)
        seen_from = self.hosts.rank(self.host, 0) if self.spans else 0  # the first rank that the launcher has
        request = {"op": "arena", "name": self._arena_name(), "size_bytes": size_bytes, "rules": rules}
        request |= {"training": self._arenas, "first": first - seen_from}
        reply, descriptors = self._ask(request, descriptors=1)
        if "over" in reply:
            raise RunOver("training was over before this worker could take part")
        return descriptors[0]

    def snapshots(self, name: str, size_bytes: int) -> int:
        """The descriptor of memory for the first training's snapshots, which outlives all workers and which all share.

        Arguments:
            name: of what is kept there.

        Raises:
            LaunchError: where it cannot be had.
        """
        self._snapshots.add(SNAPSHOTS + name)
        request = {"op": "arena", "name": SNAPSHOTS + name, "size_bytes": size_bytes, "outlives": True}
        return self._ask(request, descriptors=1)[1][0]

    def kept_snapshots(self) -> dict[str, int]:
        """The names of what is kept in the memory of snapshots, each with that memory's size in bytes."""
        found = self._ask({"op": "kept"})[0]["kept"]
        return {name.removeprefix(SNAPSHOTS): size for name, size in found.items() if name.startswith(SNAPSHOTS)}

    def release_snapshots(self, but: str) -> None:
        """The keeper may let go of the memory of all others."""
        older = self._snapshots - {SNAPSHOTS + but}
        self._snapshots -= older
        self._release(older)

    def _arena_name(self) -> str:
        return f"{self._place} arena {self._arenas}"

    def _ask(self, request: Message, descriptors: int = 0) -> tuple[Message, list[int]]:
        """Send a request and wait for its reply; one at a time, whichever thread asks."""
        assert self.control is not None
        with self._asking:
            send(self.control, request)
            reply, received = receive(self.control, descriptors)
        if reply is None:
            raise LaunchError("the process that started this worker is gone; start the run again")
        if "error" in reply:
            raise LaunchError(reply["error"])
        return reply, received

    @property
    def trainings(self) -> int:
        """How many times this process has begun to train: the same for all workers at each beginning."""
        return self._arenas

    def store(self, deadline_s: float) -> "Store":
        """Where workers of all hosts leave addresses for each other."""
        if self.launcher == "unisono":
            from unisono.launch.store import LauncherStore

            return LauncherStore(lambda request: self._ask(request)[0], deadline_s)
        if self._store is None:
            from torch.distributed.rendezvous import rendezvous

            self._store = next(iter(rendezvous("env://", self.rank, self.size)))[0]
        return self._store

    def take_output(self) -> None:
        """What this worker prints from now on is shown: it has become the chief."""
        if self.launcher != "unisono":
            return
        _, descriptors = self._ask({"op": "output"}, descriptors=2)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)

    def release_arena(self) -> None:
        """Training is over: the keeper may let go of the last arena, so that its memory ends with the workers' maps."""
        if self._arenas:
            self._release({self._arena_name(), *self._snapshots})

    def _release(self, names: Iterable[str]) -> None:
        if self.control is not None:
            for name in sorted(names):
                send(self.control, {"op": "release", "name": name})


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    return "ipykernel" in sys.modules


@functools.cache
def this_process() -> World:
    """This process's world: one line to the arena's keeper, however many times it trains."""
    return discover(os.environ)


def discover(environ: Mapping[str, str]) -> World:
    """This process's world, from the environment that ``unisono run``, ``torchrun`` or nobody has set."""
    size = int(environ.get("WORLD_SIZE", "1"))
    rank = int(environ.get("RANK", "0"))
    if CONTROL in environ:
        control = socket.socket(fileno=os.dup(int(environ[CONTROL])))
        hosts = Hosts.read(environ.get(HOSTS, str(size)))
        world = World(rank, hosts, control, "unisono", environ.get(ADDRESS))
        world.members = int(environ.get(MEMBERS, world.local_size))
        world.joins = JOINS in environ
        world.spans = SPANS in environ
        world.rolled_back = int(environ[ROLLED_BACK]) if ROLLED_BACK in environ else None
        world.generation = int(environ.get(GENERATION, 1))
        world.run_dir = environ.get(RUN_DIR)
        world.before = tuple(map(int, filter(None, environ.get(BEFORE, "").split(","))))
        return world
    if size == 1:
        return World(0, Hosts((1,)), None, "python")
    world = World(rank, Hosts((size,)), None, "torchrun")
    if int(environ.get("LOCAL_WORLD_SIZE", size)) != size:
        world.hosts = _torchrun_hosts(environ, world)
        world.address = _own_address(environ)
    if world.local_size > 1:
        world.control = connect(environ, world.local_rank)
    return world


def _own_address(environ: Mapping[str, str]) -> str:
    """The address from which this host reaches the first one; nothing is sent to find it."""
    where = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
    family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _torchrun_hosts(environ: Mapping[str, str], world: World) -> Hosts:
    """Which ranks share a host, as each of them says; torchrun numbers them host by host."""
    store = world.store(CONNECT_DEADLINE_S)
    store.set(f"unisono/host of {world.rank}", environ["GROUP_RANK"])
    numbers = [int(store.get(f"unisono/host of {rank}")) for rank in range(world.size)]
    return Hosts(tuple(numbers.count(host) for host in sorted(set(numbers))))
