"""Which hosts train, as a numbered record that a majority of the ones before must hold: Paxos, no I/O.

Each generation is decided by the hosts of the one before. A candidate asks them to promise that they heed no older
ballot, and to tell what they have accepted before; then to accept its record, or the one that it was told of. What a
quorum has accepted is decided, whoever is lost afterwards: two quorums share a voter.

Source: Lamport, Paxos Made Simple (2001).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

WITNESS = -1
"""The number of the voter that trains nothing."""

Ballot = tuple[int, int]
"""(attempt, candidate's number): of two, the larger one is heeded."""
NO_BALLOT: Ballot = (0, WITNESS)


@dataclass(frozen=True, slots=True)
class Generation:
    """Who trains together.

    Attributes:
        number: from 1.
        hosts: the numbers of their launchers, in order.
        slots: the places of each host's workers that take part.
        coordinator: the host whose launcher has brought it about.
        step: what had been committed by then, as far as it knew.
    """

    number: int
    hosts: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    coordinator: int
    step: int = 0

    @classmethod
    def first(cls, sizes: Sequence[int]) -> "Generation":
        """All hosts, with so many workers each."""
        return cls(1, tuple(range(len(sizes))), tuple(tuple(range(size)) for size in sizes), 0)

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> "Generation":
        """From a message or a file.

        Raises:
            ValueError: for what is none.
        """
        try:
            hosts, slots = tuple(message["hosts"]), tuple(tuple(each) for each in message["slots"])
            number, coordinator, step = (message[key] for key in ("number", "coordinator", "step"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a generation: {message!r}") from error
        whole = all(type(v) is int and v >= 0 for v in (*hosts, number, coordinator, step, *chain(*slots)))
        ordered = all(list(some) == sorted(set(some)) and some for some in (hosts, *slots))
        if not whole or not ordered or len(hosts) != len(slots):
            raise ValueError(f"not a generation: {message!r}")
        return cls(number, hosts, slots, coordinator, step)

    def written(self) -> dict[str, Any]:
        """For a message or a file."""
        return {
            "number": self.number,
            "hosts": list(self.hosts),
            "slots": [list(each) for each in self.slots],
            "coordinator": self.coordinator,
            "step": self.step,
        }

    def change(self, before: "Generation") -> dict[str, Any]:
        """How it differs from the one before: what is sent to those who know that one."""
        was, now = dict(zip(before.hosts, before.slots, strict=True)), dict(zip(self.hosts, self.slots, strict=True))
        return {
            "number": self.number,
            "gone": [host for host in before.hosts if host not in now],
            "slots": [[host, list(slots)] for host, slots in now.items() if was.get(host) != slots],
            "coordinator": self.coordinator,
            "step": self.step,
        }

    def changed(self, change: Mapping[str, Any]) -> "Generation":
        """The one that follows it.

        Raises:
            ValueError: for what is no change of this one.

        >>> before = Generation.first([1, 2, 1])
        >>> after = Generation(2, (0, 1), ((0,), (1,)), 0, 7)
        >>> before.changed(after.change(before)) == after
        True
        """
        slots = dict(zip(self.hosts, self.slots, strict=True))
        try:
            for host in change["gone"]:
                del slots[host]
            slots |= {host: tuple(some) for host, some in change["slots"]}
            rest = {key: change[key] for key in ("number", "coordinator", "step")}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no change of generation {self.number}: {change!r}") from error
        if rest["number"] != self.number + 1 or not all(type(host) is int for host in slots):
            raise ValueError(f"no change of generation {self.number}: {change!r}")
        hosts = sorted(slots)
        return Generation.read({**rest, "hosts": hosts, "slots": [slots[host] for host in hosts]})

    def of(self, host: int) -> tuple[int, ...]:
        """The slots of a host's workers; none where it takes no part."""
        return self.slots[self.hosts.index(host)] if host in self.hosts else ()


@dataclass(frozen=True, slots=True)
class Electorate:
    """Who decides what follows a generation.

    Attributes:
        hosts: of that generation.
        fenced: those of them that are proven dead.
        witness: whether there is one.

    >>> pair = Electorate((0, 1), witness=True)
    >>> pair.is_quorum({0}), pair.is_quorum({0, WITNESS})
    (False, True)
    >>> Electorate((0, 1), fenced=frozenset({1})).is_quorum({0})
    True
    """

    hosts: tuple[int, ...]
    fenced: frozenset[int] = frozenset()
    witness: bool = False

    def is_quorum(self, votes: Collection[int]) -> bool:
        """Whether these votes decide: more than half of the hosts, half and the witness, or all that can be alive."""
        return Tally(self).add(*votes)

    def missing(self, votes: Collection[int]) -> list[int]:
        """Hosts that may be alive and have not voted."""
        return sorted(set(self.hosts) - self.fenced - set(votes))


@dataclass(slots=True)
class Tally:
    """Votes as they come in, each counted once and at once, however many hosts there are."""

    electorate: Electorate
    votes: set[int] = field(default_factory=set)
    _hosts: frozenset[int] = field(init=False)
    _count: int = 0
    _fenced: int = 0  # of those that are counted
    _living: int = field(init=False)

    def __post_init__(self) -> None:
        self._hosts = frozenset(self.electorate.hosts)
        self._living = len(self._hosts - self.electorate.fenced)

    def add(self, *voters: int) -> bool:
        """Count votes; whether all that came in so far decide."""
        electorate = self.electorate
        for voter in voters:
            if voter not in self.votes:
                self.votes.add(voter)
                self._count += voter in self._hosts
                self._fenced += voter in self._hosts and voter in electorate.fenced
        half_and_witness = electorate.witness and WITNESS in self.votes and 2 * self._count == len(self._hosts)
        return 2 * self._count > len(self._hosts) or half_and_witness or self._count - self._fenced == self._living


@dataclass(slots=True)
class Acceptor:
    """One voter.

    A promise holds for all generations to come. One who accepts a ballot for a generation has thus promised it for the
    next as well, and cannot have accepted anything for that one yet: a candidate whose generation has been accepted by
    a quorum of the hosts that are in it need not ask again before it proposes the one after (Multi-Paxos).

    Arguments:
        current: the generation that it knows to be decided.
        keep: called with all of it before anything is answered; puts it on a disk, or raises OSError.

    Attributes:
        promised: the ballot below which nothing is heeded.
        accepted: what was accepted for it.
    """

    current: Generation
    keep: Callable[[dict[str, Any]], None]
    promised: Ballot = NO_BALLOT
    accepted: tuple[Ballot, Generation] | None = None

    @classmethod
    def read(cls, message: Mapping[str, Any], keep: Callable[[dict[str, Any]], None]) -> "Acceptor":
        """As it was kept.

        Raises:
            ValueError: for what was not.
        """
        try:
            accepted = message["accepted"]
            told = None if accepted is None else (ballot(accepted["ballot"]), Generation.read(accepted["generation"]))
            return cls(Generation.read(message["current"]), keep, ballot(message["promised"]), told)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a voter's record: {error!r}") from error

    def written(self) -> dict[str, Any]:
        """All of it."""
        told = self.accepted
        accepted = None if told is None else {"ballot": list(told[0]), "generation": told[1].written()}
        return {"current": self.current.written(), "promised": list(self.promised), "accepted": accepted}

    def resume(self, before: "Acceptor") -> None:
        """Stand by what this voter's earlier process has promised and accepted."""
        if before.current.number > self.current.number:
            self.current = before.current
        self.promised = max(self.promised, before.promised)
        self.accepted = before.accepted if before.current.number == self.current.number else None

    def promise(self, number: int, asked: Ballot) -> bool:
        """Whether it will heed nothing below a ballot for generation ``number``."""
        if number != self.current.number + 1 or asked <= self.promised:
            return False
        return self._becomes(self.current, asked, self.accepted)

    def accept(self, asked: Ballot, generation: Generation) -> bool:
        """Whether it takes a generation for the next one."""
        if generation.number != self.current.number + 1 or asked < self.promised:
            return False
        return self._becomes(self.current, asked, (asked, generation))

    def learn(self, generation: Generation) -> bool:
        """A generation is decided; whether that is news."""
        if generation.number <= self.current.number:
            return False
        self._becomes(generation, self.promised, None)
        self.current, self.accepted = generation, None  # a fact, whatever a disk can hold
        return True

    def _becomes(self, current: Generation, promised: Ballot, accepted: tuple[Ballot, Generation] | None) -> bool:
        """Whether it could be kept; else it stays as it was, and has said nothing."""
        after = replace(self, current=current, promised=promised, accepted=accepted)
        try:
            self.keep(after.written())
        except OSError:
            return False
        self.promised, self.accepted = promised, accepted
        return True


@dataclass(slots=True)
class Proposal:
    """A candidate's attempt to bring about the next generation.

    Arguments:
        wanted: what it is to be, where nothing else has been accepted before.
        ballot: its own.
        electorate: who decides.
        sent: what voters are asked to accept, once enough have promised; from the beginning, where they have before.

    Attributes:
        decided: enough have accepted it.
    """

    wanted: Generation
    ballot: Ballot
    electorate: Electorate
    sent: Generation | None = None
    decided: bool = False
    _promises: Tally = field(init=False)
    _votes: Tally = field(init=False)
    _before: list[tuple[Ballot, Generation]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._promises, self._votes = Tally(self.electorate), Tally(self.electorate)

    @property
    def voters(self) -> set[int]:
        """Those who have accepted it."""
        return self._votes.votes

    def promised(self, voter: int, accepted: tuple[Ballot, Generation] | None) -> bool:
        """A voter has promised; whether it is the one that makes them enough."""
        if accepted is not None:
            self._before.append(accepted)
        if not self._promises.add(voter) or self.sent is not None:
            return False
        self.sent = max(self._before, key=lambda told: told[0])[1] if self._before else self.wanted
        return True

    def accepted(self, voter: int) -> bool:
        """A voter has accepted; whether it is the one that decides."""
        if self.sent is None or not self._votes.add(voter) or self.decided:
            return False
        self.decided = True
        return True


def ballot(value: Any) -> Ballot:
    """From a message or a file.

    Raises:
        ValueError: for what is none.
    """
    if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int for part in value):
        raise ValueError(f"not a ballot: {value!r}")
    return value[0], value[1]
