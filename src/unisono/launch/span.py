"""One host's part in a run that survives the loss of hosts: what its launcher tells the others, and its workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from unisono.comm.header import Course, Header
from unisono.fault.coordination import Report
from unisono.fault.generation import Generation
from unisono.launch.quorum import Quorum, changed, named


@dataclass(slots=True)
class Span:
    """Of one set of workers.

    Arguments:
        quorum: of all hosts.
        header: the words of what is trained.
        joins: this host's workers are to join those who train already.
    """

    quorum: Quorum
    header: Header
    joins: bool
    _members: tuple[int, ...] = ()
    _in: set[int] = field(default_factory=set)  # slots of this host's that take part, or did when it last did
    _awaited: set[int] = field(default_factory=set)  # those of lost workers, until others there are ready
    _out: bool = False  # the others have gone on without this host's earlier workers

    def __post_init__(self) -> None:
        nodes = self.quorum.nodes
        assert nodes.coordination is not None
        current = nodes.coordination.current
        self._members, self._in = current.hosts, set() if self.joins else set(current.of(nodes.number))

    def tend(self, living: Sequence[int]) -> None:
        """Tell the others how far this host is, and its workers what is decided.

        Arguments:
            living: the slots of workers that have not ended.
        """
        nodes, header = self.quorum.nodes, self.header
        if not nodes.survives:
            if header.course is not Course.TRAINING and not self.joins:
                return
            self.quorum.begin()
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
        header.undecided = nodes.is_undecided()
        self.quorum.look(self._members)

    def lose(self, slot: int) -> None:
        """A worker has ended."""
        self._awaited.add(slot)

    def _able(self, living: Sequence[int]) -> list[int]:
        """The slots of workers that can take part: those who train, and those who are ready to."""
        coordination, header = self.quorum.nodes.coordination, self.header
        assert coordination is not None
        able = [s for s in living if header.ready(s) or (s in self._in and s not in self._awaited)]
        if header.course is Course.STARTING:  # all of this host begin together, once the others have gone on
            self._out = self._out or not coordination.belongs
            return able if self._out and len(able) == header.slots else []
        return able

    def _decided(self, generation: Generation) -> None:
        own = self.quorum.nodes.number
        mine, self._in = set(self._in), set(generation.of(own)) or self._in
        self._awaited -= {slot for slot in self._in if self.header.ready(slot)}
        self.header.set_hosts(generation.number, dict(zip(generation.hosts, generation.slots, strict=True)))
        told = changed(self._members, generation.hosts)
        self._members = generation.hosts
        if self._in and mine != self._in and not told:
            told = [f"{len(self._in)} workers of host {own}"]
        told += [f"{named(generation.hosts)} go{'es' * (len(generation.hosts) == 1)} on"]
        self.quorum.say(f"{', '.join(told)} (generation {generation.number}, from step {generation.step})")
