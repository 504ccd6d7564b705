"""One launcher's part in deciding which hosts train: whom it follows, and what it does as the coordinator. No I/O.

Every launcher follows the one with the lowest number that it reaches; that one coordinates, as long as it has a quorum.
Beats go both ways; who is not heard for a while is lost. The coordinator proposes a generation whenever hosts are lost
or come back, or all have stopped because their wires broke. Nothing depends on clocks being alike, and nothing on who
is right about who is alive: what a quorum has accepted counts (`fault.generation`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from unisono.fault.generation import NO_BALLOT, WITNESS, Acceptor, Ballot, Electorate, Generation, Proposal, ballot

Message = dict[str, Any]

BEAT_S = 0.25
RETRY_S = 1.0
"""After which one that could not be reached is tried again."""
REACH_S = 0.5
"""How long it is tried, and how long a new candidate waits for others to follow it."""
PROPOSAL_S = 1.0
STALL_S = 0.6
"""All have stopped: who has caused it, and is lost, should be known by then."""
BATCH_S = 0.1
"""Changes that come within it are one generation: there are at most ten a second."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a launcher says of its host.

    Attributes:
        step: the last that its workers have committed.
        slots: of its workers that can take part.
        stalled: the generation in which they have stopped, since they cannot go on in it; 0 for none.
        done: they have ended in good order.
        joins: they have started again, and have no state until others give it to them.
    """

    step: int = 0
    slots: tuple[int, ...] = (0,)
    stalled: int = 0
    done: bool = False
    joins: bool = False

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> "Report":
        """From a message."""
        return cls(**{**message, "slots": tuple(message["slots"])})


@dataclass(slots=True)
class _Peer:
    """What is known of another launcher.

    Attributes:
        up: there is a line to it.
        heard: when it was, last, or when it was first waited for.
        told: when a message has come from it, last.
        follows: whom.
        hears: it has heard this launcher, of late.
        shunned: until when it is not tried.
    """

    up: bool = False
    heard: float = float("-inf")
    told: float = float("-inf")
    follows: int | None = None
    hears: bool = False
    report: Report = field(default_factory=Report)
    shunned: float = float("-inf")


class Coordination:
    """One launcher's.

    Arguments:
        number: of this host.
        acceptor: its vote, which knows the generation that began.
        limit_s: after which one that is not heard is lost.
        witness: there is one.

    Attributes:
        report: of this host; set by its launcher.
        follows: whom this launcher follows; itself where it coordinates, or would.
        fenced: hosts that are proven dead.
        outbox: messages to be sent, each with whom it is for; taken away by whoever sends them.
        decided: generations to be acted on, in order; taken away too.
        over: all hosts have ended in good order.
        decides: whether anybody can be lost: before training, and in what is not survived, nobody can.
    """

    def __init__(self, number: int, acceptor: Acceptor, limit_s: float, *, witness: bool = False) -> None:
        self.number = number
        self.acceptor = acceptor
        self.limit_s = limit_s
        self.report = Report()
        self.follows: int | None = acceptor.current.coordinator
        self.fenced: set[int] = set()
        self.outbox: list[tuple[int, Message]] = []
        self.decided: list[Generation] = []
        self.over = False
        self.decides = True
        self._witness = witness
        self._peers: dict[int, _Peer] = {}
        self._seeking: tuple[int, float] | None = None  # whom, since when
        self._hint: int | None = None
        self._led_since = float("-inf")
        self._probed: list[int] = []
        self._stalled_since: float | None = None
        self._changed_since: float | None = None
        self._proposed: tuple[Proposal, float] | None = None
        self._last_proposed = float("-inf")
        self._attempt = 0
        self._beaten = float("-inf")

    @property
    def current(self) -> Generation:
        """The generation that is known to be decided."""
        return self.acceptor.current

    @property
    def belongs(self) -> bool:
        """Whether this host is in it."""
        return self.number in self.current.hosts

    def begin(self, peers: Iterable[int], now: float) -> None:
        """There are lines to these, who have just been heard."""
        for number in peers:
            self._peers[number] = _Peer(up=True, heard=now, told=now)
        for number in self.current.hosts:
            if number != self.number:
                self._peer(number).heard = now

    def begin_deciding(self, now: float) -> None:
        """From now on hosts may be lost."""
        self.decides = True
        for number in self.current.hosts:
            if number != self.number:
                self._peer(number).heard = now

    def wanted_lines(self) -> list[int]:
        """Those to whom there should be a line, and is none."""
        wanted = [self._seeking[0]] if self._seeking is not None else list(self._probed)
        if self._witness and self.follows == self.number:
            wanted.append(WITNESS)
        return [number for number in wanted if not self._peer(number).up]

    def line_is_up(self, number: int, now: float) -> None:
        """A line to another is there."""
        peer = self._peer(number)
        peer.up, peer.heard, peer.shunned = True, now, float("-inf")

    def line_is_down(self, number: int, now: float) -> None:
        """The last line to another is gone, or could not be made."""
        peer = self._peer(number)
        peer.up, peer.shunned = False, now + RETRY_S

    def silent_lines(self, now: float) -> list[int]:
        """Those whose lines carry nothing, though they are up."""
        limit = 2 * self.limit_s
        return [n for n, peer in self._peers.items() if peer.up and n != WITNESS and now - peer.heard > limit]

    def hurry(self) -> None:
        """Tell the others at once what has changed here."""
        self._beaten = float("-inf")

    def is_heard(self, number: int, now: float) -> bool:
        """Whether another is alive, as far as this launcher knows."""
        return self._lives(number, now)

    def fence(self, number: int) -> None:
        """Somebody vouches for a host being dead."""
        self.fenced.add(number)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.decides and self.follows not in (None, self.number) and not self._lives(self.follows, now):
            self._peer(self.follows).shunned = now + RETRY_S
            self.follows = None
        if self.follows is None:
            self._seek(now)
        if self.follows == self.number:
            self._lead(now)
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._beat(now)

    def heard(self, number: int, message: Mapping[str, Any], now: float) -> None:
        """A message has come from another.

        Raises:
            ValueError: for what no launcher sends.
        """
        peer = self._peer(number)
        if number == self.follows and not self._hears(number, now):
            self._beaten = float("-inf")  # it waits to be told that it is heard
        peer.heard = peer.told = now
        match message.get("op"):
            case "beat":
                peer.follows, peer.hears = message["follows"], bool(message["hears"])
                peer.report = Report.read(message["report"])
                if peer.follows == self.number and not peer.hears:
                    self._beaten = float("-inf")
                self._compare(number, message["generation"])
                if number == self.follows and peer.follows not in (number, None):
                    self.follows, self._hint = None, peer.follows  # it follows another itself
            case "prepare":
                self._asked_to_promise(number, Generation.read(message["current"]), ballot(message["ballot"]), now)
            case "accept":
                self._asked_to_accept(number, Generation.read(message["generation"]), ballot(message["ballot"]))
            case "promise":
                told = message["accepted"]
                accepted = None if told is None else (ballot(told["ballot"]), Generation.read(told["generation"]))
                self._promised(number, message["number"], ballot(message["ballot"]), accepted)
            case "accepted":
                self._accepted(number, message["number"], ballot(message["ballot"]))
            case "refused":
                self._attempt = max(self._attempt, ballot(message["promised"])[0])
                if self._proposed is not None and message["number"] == self._proposed[0].wanted.number:
                    self._proposed = None
            case "generation":
                self._learn(Generation.read(message["generation"]))
            case "end":
                self.over = True
            case other:
                raise ValueError(f"no launcher sends {other!r}")

    def waits_for(self, now: float) -> list[int]:
        """Hosts without which nothing can be decided; none while it can, or where another decides."""
        if not self.decides or self.follows != self.number or now - self._led_since < REACH_S:
            return []
        votes = self._voters(now)
        electorate = self._electorate()
        return [] if electorate.is_quorum(votes) else electorate.missing(votes)

    def _peer(self, number: int) -> _Peer:
        return self._peers.setdefault(number, _Peer())

    def _lives(self, number: int | None, now: float) -> bool:
        peer = self._peers.get(number) if number is not None else None
        return peer is not None and peer.up and now - peer.heard <= self.limit_s

    def _hears(self, number: int, now: float) -> bool:
        return now - self._peer(number).told <= self.limit_s

    def _electorate(self) -> Electorate:
        return Electorate(self.current.hosts, frozenset(self.fenced), self._witness)

    def _candidates(self) -> list[int]:
        """Whom this launcher would follow, the most wanted first."""
        hosts = [number for number in self.current.hosts if number not in self.fenced]
        if not self.belongs:
            return sorted(hosts, key=lambda number: number != self.current.coordinator)
        return [number for number in hosts if number <= self.number]

    def _seek(self, now: float) -> None:
        """Find whom to follow."""
        if self._seeking is not None:
            number, since = self._seeking
            if self._peer(number).up:
                self._follow(number, now)
                return
            if self._peer(number).shunned <= now and now - since < REACH_S:
                return
            self._peer(number).shunned = max(self._peer(number).shunned, now + RETRY_S)
            self._seeking = None
        hint, self._hint = self._hint, None
        tried = [hint] if hint is not None and hint != self.number else []
        for number in (*tried, *self._candidates()):
            if number == self.number or (self._peer(number).up and self._peer(number).shunned <= now):
                self._follow(number, now)
                return
            if self._peer(number).shunned <= now:
                self._seeking = number, now
                return

    def _follow(self, number: int, now: float) -> None:
        self.follows, self._seeking = number, None
        if number == self.number:
            self._led_since = now
            self._stalled_since = None
        else:
            self._peer(number).heard = now
            self._beaten = float("-inf")  # tell it at once

    def _voters(self, now: float) -> set[int]:
        """Those whose votes this launcher can have."""
        mine = [n for n, peer in self._peers.items() if peer.follows == self.number and peer.hears]
        followers = {n for n in mine if self._lives(n, now)}
        witness = {WITNESS} if self._witness and self._peer(WITNESS).up else set()
        return followers | {self.number} | witness

    def _lead(self, now: float) -> None:
        """Bring about the next generation, where one is wanted and can be had."""
        voters = self._voters(now)
        self._probed = []
        self._end_if_all_done(voters, now)
        if not self.decides:
            return
        if not self._electorate().is_quorum(voters):
            self._proposed = None
            self._probe(now)
            return
        if self._proposed is not None and now - self._proposed[1] > PROPOSAL_S:
            self._proposed = None
        wanted = self._wanted(voters, now)
        if wanted is None or self._proposed is not None:
            self._changed_since = self._changed_since if wanted is not None else None
            return
        if self._changed_since is None:
            self._changed_since = now
        quiet = any(now - self._peer(number).told > 2 * BEAT_S for number in voters - {self.number, WITNESS})
        patience_s = self.limit_s if quiet else BATCH_S if len(voters) > 2 else 0.0
        if self._absent(voters) and now - self._changed_since < patience_s:
            return  # more may be lost at the same time
        if now - self._last_proposed < BATCH_S:
            return
        self._changed_since, self._last_proposed = None, now
        self._propose(wanted, voters, now)

    def _probe(self, now: float) -> None:
        """See whether those who are missing can be reached again: they may know more, or are to be followed."""
        others = [number for number in self.current.hosts if number != self.number]
        self._probed = [number for number in others if not self._peer(number).up and self._peer(number).shunned <= now]
        if any(number < self.number and self._lives(number, now) for number in others):
            self.follows = None

    def _absent(self, voters: set[int]) -> list[int]:
        """Hosts of the generation that are missing, and may only be late."""
        return self._electorate().missing(voters)

    def _report(self, number: int) -> Report:
        return self.report if number == self.number else self._peer(number).report

    def _wanted(self, voters: set[int], now: float) -> Generation | None:
        """The generation that should follow; None where the current one is as it should be."""
        current = self.current
        reports = {number: self._report(number) for number in voters - {WITNESS}}
        absent = self._absent(voters)
        reachable = [number for number in absent if self._peer(number).shunned <= now]
        if reachable and now - self._led_since < REACH_S:
            return None  # they may come yet
        lost = set(current.hosts) - {number for number, r in reports.items() if r.slots or r.done}
        able = {number for number, r in reports.items() if r.slots and not r.done}
        staying = {number for number in able & set(current.hosts) if not reports[number].joins}
        joining = able - set(current.hosts)
        others = any(reports[number].slots != current.of(number) for number in staying)
        working = [reports[number] for number in staying]
        stalled = bool(working) and all(r.stalled >= current.number for r in working)
        self._stalled_since = (self._stalled_since or now) if stalled else None
        heard = all(now - self._peer(number).told <= 2 * BEAT_S for number in staying - {self.number})
        renewed = heard and self._stalled_since is not None and now - self._stalled_since > STALL_S
        if not staying or not (lost or joining or others or renewed or current.coordinator != self.number):
            return None
        hosts = tuple(sorted(able))
        slots = tuple(reports[number].slots for number in hosts)
        return Generation(current.number + 1, hosts, slots, self.number, max(r.step for r in reports.values()))

    def _end_if_all_done(self, voters: set[int], now: float) -> None:
        """Everyone has ended in good order; those who are lost by then, or have yet to join, are not waited for."""
        here = set(self.current.hosts) & voters
        absent = [number for number in self.current.hosts if number not in voters]
        late = not self.decides or now - self._led_since < REACH_S or not self._electorate().is_quorum(voters)
        if self.over or not here or (absent and late):
            return
        reports = [self._report(number) for number in here]
        if any(r.done for r in reports) and all(r.done or r.joins for r in reports):
            self.over = True
            self._tell({"op": "end"})

    def _propose(self, wanted: Generation, voters: set[int], now: float) -> None:
        self._attempt = max(self._attempt, self.acceptor.promised[0]) + 1
        own: Ballot = (self._attempt, self.number)
        proposal = Proposal(wanted, own, self._electorate())
        self._proposed = proposal, now
        for voter in sorted(voters - {self.number}):
            self._send(voter, {"op": "prepare", "current": self.current.written(), "ballot": list(own)})
        before = self.acceptor.accepted
        if self.acceptor.promise(wanted.number, own):
            self._promised(self.number, wanted.number, own, before)

    def _asked_to_promise(self, number: int, current: Generation, asked: Ballot, now: float) -> None:
        self._learn(current)
        elsewhere = self.follows not in (None, number) and self._lives(self.follows, now)
        before = self.acceptor.accepted
        if self.decides and not elsewhere and self.acceptor.promise(current.number + 1, asked):
            accepted = None
            if before is not None:
                accepted = {"ballot": list(before[0]), "generation": before[1].written()}
            answer = {"op": "promise", "number": current.number + 1, "ballot": list(asked), "accepted": accepted}
            self._send(number, answer)
        else:
            self._refuse(number, current.number)

    def _asked_to_accept(self, number: int, generation: Generation, asked: Ballot) -> None:
        if self.acceptor.accept(asked, generation):
            self._send(number, {"op": "accepted", "number": generation.number, "ballot": list(asked)})
        else:
            self._refuse(number, generation.number - 1)

    def _refuse(self, number: int, theirs: int) -> None:
        self._compare(number, theirs)
        promised = list(self.acceptor.promised)
        self._send(number, {"op": "refused", "number": theirs + 1, "promised": promised})

    def _promised(self, voter: int, number: int, own: Ballot, accepted: tuple[Ballot, Generation] | None) -> None:
        proposal = self._proposal(number, own)
        if proposal is None or not proposal.promised(voter, accepted):
            return
        assert proposal.sent is not None
        self._tell({"op": "accept", "generation": proposal.sent.written(), "ballot": list(own)})
        if self.acceptor.accept(own, proposal.sent):
            self._accepted(self.number, number, own)

    def _accepted(self, voter: int, number: int, own: Ballot) -> None:
        proposal = self._proposal(number, own)
        if proposal is not None and proposal.accepted(voter):
            assert proposal.sent is not None
            self._proposed = None
            self._learn(proposal.sent)
            self._tell({"op": "generation", "generation": proposal.sent.written()})

    def _proposal(self, number: int, own: Ballot) -> Proposal | None:
        """The one under way, where that is what is spoken of."""
        proposal = self._proposed[0] if self._proposed is not None else None
        return proposal if proposal is not None and (proposal.wanted.number, proposal.ballot) == (number, own) else None

    def _learn(self, generation: Generation) -> None:
        """A generation is decided."""
        if not self.acceptor.learn(generation):
            return
        self.decided.append(generation)
        self._stalled_since = self._changed_since = None
        self._attempt = NO_BALLOT[0]
        self._proposed = None
        if self.follows == self.number and generation.coordinator != self.number:  # deposed
            self.follows, self._hint = None, generation.coordinator

    def _compare(self, number: int, theirs: int) -> None:
        """Tell one that is behind."""
        if theirs < self.current.number:
            self._send(number, {"op": "generation", "generation": self.current.written()})

    def _beat(self, now: float) -> None:
        message = {
            "op": "beat",
            "generation": self.current.number,
            "follows": self.follows,
            "report": asdict(self.report),
        }
        if self.follows == self.number:
            others = [number for number, peer in self._peers.items() if peer.up and number != WITNESS]
        else:
            others = [self.follows] if self.follows is not None else []
        for number in others:
            self._send(number, {**message, "hears": self._hears(number, now)})

    def _tell(self, message: Message) -> None:
        for number, peer in self._peers.items():
            if peer.up:
                self._send(number, message)

    def _send(self, number: int, message: Message) -> None:
        self.outbox.append((number, message))
