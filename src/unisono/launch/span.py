"""One host's part in a run that survives the loss of hosts: what its launcher tells the others, and its workers."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unisono.comm.header import Course, Header
from unisono.errors import ConfigurationError, WorkerFailed
from unisono.fault.coordination import Report
from unisono.fault.generation import Generation
from unisono.fault.rules import Rules
from unisono.launch.nodes import Nodes

DIRECTORY = "membership"
"""In the run's directory: each host's vote."""


@dataclass(slots=True)
class Span:
    """Of one set of workers.

    Arguments:
        nodes: the launchers of all hosts.
        rules, header: of what is trained, and its words.
        joins: this host's workers are to join those who train already.
        say: tells the user something.

    Attributes:
        failure: why the run cannot go on.
    """

    nodes: Nodes
    rules: Rules
    header: Header
    joins: bool
    say: Callable[[str], None] = field(default=lambda text: print(f"unisono: {text}", file=sys.stderr, flush=True))
    failure: WorkerFailed | None = None
    _members: tuple[int, ...] = ()
    _in: set[int] = field(default_factory=set)  # slots of this host's that take part, or did when it last did
    _awaited: set[int] = field(default_factory=set)  # those of lost workers, until others there are ready
    _waiting: tuple[int, ...] = ()
    _out: bool = False  # the others have gone on without this host's earlier workers

    def __post_init__(self) -> None:
        assert self.nodes.coordination is not None
        current = self.nodes.coordination.current
        self._members, self._in = current.hosts, set() if self.joins else set(current.of(self.nodes.number))

    @property
    def run_dir(self) -> Path | None:
        """Where the run's records go."""
        found = self.nodes.run_dir or self.rules.run_dir
        return Path(found) if found is not None else None

    def tend(self, living: Sequence[int]) -> None:
        """Tell the others how far this host is, and its workers what is decided.

        Arguments:
            living: the slots of workers that have not ended.
        """
        nodes, header = self.nodes, self.header
        if not nodes.survives:
            if header.course is not Course.TRAINING and not self.joins:
                return
            nodes.survive(self.run_dir / DIRECTORY if self.run_dir else None, self.rules.host_deadline_s)
        if nodes.over and header.course is Course.STARTING:
            header.course = Course.OVER  # its workers were to join those who have ended
        if header.course is Course.OVER:
            return
        stalled = max((header.left(slot) for slot in living), default=0)
        joins = self.joins and header.course is Course.STARTING
        nodes.report(Report(header.committed, tuple(self._able(living)), stalled, joins=joins))
        nodes.poll()
        for generation in nodes.take_decided():
            self._decided(generation)
        self._look_who_is_missing()

    def lose(self, slot: int) -> None:
        """A worker has ended."""
        self._awaited.add(slot)

    def fence(self, host: int) -> str:
        """Somebody vouches for a host being dead.

        Raises:
            ConfigurationError: where it is this one, none of them, or heard.
        """
        coordination = self.nodes.coordination
        assert coordination is not None
        if host == self.nodes.number or host not in coordination.current.hosts:
            known = ", ".join(map(str, coordination.current.hosts))
            raise ConfigurationError(f"host {host} cannot be fenced on host {self.nodes.number}; the hosts are {known}")
        if coordination.is_heard(host, self.nodes.clock()):
            raise ConfigurationError(f"host {host} is not dead: host {self.nodes.number} hears it; end it before")
        coordination.fence(host)
        return f"host {host} counts as dead"

    def _able(self, living: Sequence[int]) -> list[int]:
        """The slots of workers that can take part: those who train, and those who are ready to."""
        coordination, header = self.nodes.coordination, self.header
        assert coordination is not None
        able = [s for s in living if header.ready(s) or (s in self._in and s not in self._awaited)]
        if header.course is Course.STARTING:  # all of this host begin together, once the others have gone on
            self._out = self._out or not coordination.belongs
            return able if self._out and len(able) == header.slots else []
        return able

    def _decided(self, generation: Generation) -> None:
        before, self._members = set(self._members), generation.hosts
        mine, self._in = set(self._in), set(generation.of(self.nodes.number)) or self._in
        self._awaited -= {slot for slot in self._in if self.header.ready(slot)}
        now = set(generation.hosts)
        self.header.set_hosts(generation.number, dict(zip(generation.hosts, generation.slots, strict=True)))
        told = [f"{_hosts(sorted(before - now))} lost"] if before - now else []
        told += [f"{_hosts(sorted(now - before))} joined"] if now - before else []
        if self._in and mine != self._in and not told:
            told = [f"{len(self._in)} workers of host {self.nodes.number}"]
        told += [f"{_hosts(generation.hosts)} go on" if len(now) > 1 else f"{_hosts(generation.hosts)} goes on"]
        self.say(f"{', '.join(told)} (generation {generation.number}, from step {generation.step})")

    def _look_who_is_missing(self) -> None:
        waiting = tuple(self.nodes.waits_for())
        self.header.undecided = self.nodes.is_undecided()
        if waiting == self._waiting:
            return
        self._waiting = waiting
        if not waiting:
            return
        few = f"only part of {_hosts(self._members)} is left, too few to decide who goes on: without {_hosts(waiting)}"
        if self.rules.on_tie == "stop":
            self.failure = WorkerFailed(f"{few} (fault.on_tie=stop); resume from the newest checkpoint (--resume)")
            return
        number = " or ".join(map(str, waiting))
        self.say(f"{few} nothing is trained; waiting for the link, or for: unisono fence {number} {self.run_dir}")


def _hosts(numbers: Sequence[int]) -> str:
    """Hosts for a reader.

    >>> _hosts([1]), _hosts((0, 2))
    ('host 1', 'hosts 0, 2')
    """
    return f"host{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
