"""One launcher's part in deciding which hosts train: whom it follows, and what it does as the coordinator. No I/O.

Every launcher follows the one with the lowest number that it reaches; that one coordinates, as long as it has a quorum.
Beats go both ways; who is not heard for a while is lost. The coordinator proposes a generation whenever hosts are lost
or come back, or all have stopped because their wires broke. Nothing depends on clocks being alike, and nothing on who
is right about who is alive: what a quorum has accepted counts (`fault.generation`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from unisono.fault.generation import WITNESS, Acceptor, Electorate, Generation
from unisono.fault.voting import Message, Voting, whole

MEETING = 0
"""The host at whose address all meet: it cannot call another when it comes back, and is called."""
BEAT_S = 0.25
MOST_BEATS_A_SECOND = 1250
"""That the coordinator hears: beats of more than 312 hosts are farther apart."""
LOOK_S_A_HOST = 20e-6
"""Between two looks of the coordinator at all of them: looking takes a tenth of it."""
RETRY_S = 1.0
"""After which one that could not be reached is tried again."""
REACH_S = 0.5
"""How long it is tried, and how long a new candidate waits for others to follow it."""
STALL_S = 0.6
"""All have stopped: who has caused it, and is lost, should be known by then."""
HESITATION_S = 0.5
"""A generation that is not decided on by then may be decided by others, without this host."""
VOTE_S = 5.0
"""Who has ended stays for others that it does not hear: without its vote they may be too few."""
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
        again: the generation in which one of them was lost, so that the workers of all hosts start again; 0 for none.
    """

    step: int = 0
    slots: tuple[int, ...] = (0,)
    stalled: int = 0
    done: bool = False
    joins: bool = False
    again: int = 0

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
        undecided: it does not know, as the coordinator, who goes on.
        shunned: until when it is not tried.
    """

    up: bool = False
    heard: float = float("-inf")
    told: float = float("-inf")
    follows: int | None = None
    hears: bool = False
    undecided: bool = False
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
        outbox: messages to be sent, each with those whom it is for; taken away by whoever sends them.
        decided: generations to be acted on, in order; taken away too.
        over: all hosts have ended in good order.
        decides: whether anybody can be lost: before training, and in what is not survived, nobody can.
    """

    def __init__(self, number: int, acceptor: Acceptor, limit_s: float, *, witness: bool = False) -> None:
        self.number = number
        self.voting = Voting(number, acceptor, self._send, self._learned)
        self.limit_s = limit_s
        self.report = Report()
        self.follows: int | None = acceptor.current.coordinator
        self.fenced: set[int] = set()
        self.outbox: list[tuple[tuple[int, ...], Message]] = []
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
        self._proposed_since: float | None = None  # what is still not decided
        self._witness_asked: float | None = None  # and has not answered since
        self._looked = float("-inf")
        self._missing: list[int] = []
        self._last_proposed = float("-inf")
        self._beaten = float("-inf")
        self._silence_sought = float("-inf")

    @property
    def current(self) -> Generation:
        """The generation that is known to be decided."""
        return self.voting.acceptor.current

    @property
    def belongs(self) -> bool:
        """Whether this host is in it."""
        return self.number in self.current.hosts

    @property
    def beat_s(self) -> float:
        """Seconds between two beats."""
        return max(BEAT_S, len(self.current.hosts) / MOST_BEATS_A_SECOND)

    @property
    def patience_s(self) -> float:
        """Seconds after which one that is not heard is lost: three beats at least."""
        return max(self.limit_s, 3 * self.beat_s)

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

    def wanted_lines(self, now: float) -> list[int]:
        """Those to whom there should be a line, and is none."""
        wanted = [self._seeking[0]] if self._seeking is not None else list(self._probed)
        if self.follows == self.number and MEETING not in self.current.hosts and self._peer(MEETING).shunned <= now:
            wanted.append(MEETING)
        if self._witness and self.follows == self.number:
            wanted.append(WITNESS)
        return [number for number in wanted if not self._peer(number).up]

    def line_is_up(self, number: int, now: float) -> None:
        """A line to another is there."""
        peer = self._peer(number)
        peer.up, peer.heard, peer.shunned = True, now, float("-inf")

    def line_is_down(self, number: int, now: float) -> None:
        """The last line to another is gone, or could not be made: what it has said before may be of one that ended."""
        peer = self._peer(number)
        peer.up, peer.shunned = False, now + RETRY_S
        peer.follows, peer.hears, peer.undecided = None, False, False
        if number == WITNESS:
            self._witness_asked = None

    def silent_lines(self, now: float) -> list[int]:
        """Those whose lines carry nothing, though they are up."""
        if now - self._silence_sought < self.beat_s:
            return []
        self._silence_sought, limit = now, 2 * self.patience_s
        asked = self._witness_asked if self._peer(WITNESS).up else None
        mute = [WITNESS] if asked is not None and now - asked > self.patience_s else []
        return mute + [n for n, peer in self._peers.items() if peer.up and n != WITNESS and now - peer.heard > limit]

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
        if self.follows == self.number and now - self._looked >= LOOK_S_A_HOST * len(self.current.hosts):
            self._looked = now
            self._lead(now)
        if now - self._beaten >= self.beat_s:
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
        if number == WITNESS:
            self._witness_asked = None
        match message.get("op"):
            case "beat":
                peer.follows, peer.hears = message["follows"], bool(message["hears"])
                peer.undecided = bool(message.get("undecided"))
                peer.report = Report.read(message["report"])
                if peer.follows == self.number and not peer.hears:
                    self._beaten = float("-inf")
                self.voting.compare(number, whole(message["generation"]), now - self.beat_s)
                if number == self.follows and peer.follows not in (number, None):
                    self.follows, self._hint = None, peer.follows  # it follows another itself
            case "end":
                self.over = True
            case _:
                elsewhere = self.follows not in (None, number) and self._lives(self.follows, now)
                self.voting.heard(number, message, now, promises=self.decides and not elsewhere)

    def waits_for(self, now: float) -> list[int]:
        """Hosts without which nothing can be decided; none while it can, or where another decides."""
        leads = self.decides and self.follows == self.number and now - self._led_since >= REACH_S
        return self._missing if leads else []

    def is_undecided(self, now: float) -> bool:
        """Whether this host does not know who goes on; others may do so without it."""
        if not self.decides or self.follows is None:
            return False
        if self.follows != self.number:
            return self._lives(self.follows, now) and self._peer(self.follows).undecided
        hesitates = self._proposed_since is not None and now - self._proposed_since > HESITATION_S
        return hesitates or bool(self.waits_for(now))

    def _peer(self, number: int) -> _Peer:
        if (peer := self._peers.get(number)) is None:
            peer = self._peers[number] = _Peer()
        return peer

    def _lives(self, number: int | None, now: float) -> bool:
        peer = self._peers.get(number) if number is not None else None
        return peer is not None and peer.up and now - peer.heard <= self.patience_s

    def _hears(self, number: int, now: float) -> bool:
        return now - self._peer(number).told <= self.patience_s

    def _electorate(self) -> Electorate:
        return Electorate(self.current.hosts, frozenset(self.fenced), self._witness)

    def _candidates(self) -> list[int]:
        """Whom this launcher would follow, the most wanted first."""
        hosts = [number for number in self.current.hosts if number not in self.fenced]
        if not self.belongs:
            return sorted(hosts, key=lambda number: number != self.current.coordinator)
        able = self.number if self.voting.abstains else self.number + 1
        return [number for number in hosts if number < able]

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
        since = now - self.patience_s
        mine = ((n, peer) for n, peer in self._peers.items() if peer.follows == self.number and peer.hears)
        followers = {n for n, peer in mine if peer.up and peer.heard >= since}
        witness = {WITNESS} if self._witness and self._peer(WITNESS).up else set()
        return followers | {self.number} | witness

    def _lead(self, now: float) -> None:
        """Bring about the next generation, where one is wanted and can be had."""
        voters = self._voters(now)
        self._probed = []
        self._end_if_all_done(voters, now)
        if not self.decides:
            return
        electorate = self._electorate()
        if not electorate.is_quorum(voters):
            self._missing = electorate.missing(voters)
            self.voting.give_up()
            self._proposed_since = None
            self._probe(now)
            return
        self._missing = []
        proposes, wanted = self.voting.proposes(now), self._wanted(voters, now)
        if wanted is None or proposes:
            self._changed_since = self._changed_since if wanted is not None else None
            self._proposed_since = self._proposed_since if proposes else None
            return
        if self._changed_since is None:
            self._changed_since = now
        since = now - 2 * self.beat_s
        quiet = any(self._peer(number).told < since for number in voters - {self.number, WITNESS})
        patience_s = self.patience_s if quiet else BATCH_S if len(voters) > 2 else 0.0
        if self._absent(voters) and now - self._changed_since < patience_s:
            return  # more may be lost at the same time
        if now - self._last_proposed < BATCH_S:
            return
        self._changed_since, self._last_proposed = None, now
        self._proposed_since = self._proposed_since or now
        if WITNESS in voters:
            self._witness_asked = self._witness_asked or now
        self.voting.propose(wanted, voters, electorate, now)

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
        slots_of = dict(zip(current.hosts, current.slots, strict=True))
        others = any(reports[number].slots != slots_of[number] for number in staying)
        working = [reports[number] for number in staying]
        stalled = bool(working) and all(r.stalled >= current.number for r in working)
        self._stalled_since = (self._stalled_since or now) if stalled else None
        renewed = any(r.again >= current.number for r in working)
        if self._stalled_since is not None and now - self._stalled_since > STALL_S:
            since = now - 2 * self.beat_s
            renewed = renewed or all(self._peer(number).told >= since for number in staying - {self.number})
        if not staying or not (lost or joining or others or renewed or current.coordinator != self.number):
            return None
        hosts = tuple(sorted(able))
        slots = tuple(reports[number].slots for number in hosts)
        return Generation(current.number + 1, hosts, slots, self.number, max(r.step for r in reports.values()))

    def _end_if_all_done(self, voters: set[int], now: float) -> None:
        """Everyone has ended in good order; those who are lost by then, or have yet to join, are not waited for.

        Who has ended itself needs no quorum for that: nothing is left to be committed. Others may need its vote, and
        are waited for a while.
        """
        here = set(self.current.hosts) & voters
        absent = [number for number in self.current.hosts if number not in voters]
        apart_s = now - max((self._peer(number).heard for number in absent), default=now)
        enough = self._electorate().is_quorum(voters) or (self.report.done and apart_s >= VOTE_S)
        late = not self.decides or now - self._led_since < REACH_S or not enough
        if self.over or not here or (absent and late):
            return
        reports = [self._report(number) for number in here]
        if any(r.done for r in reports) and all(r.done or r.joins for r in reports):
            self.over = True
            self._send(None, {"op": "end"})

    def _beat(self, now: float) -> None:
        message = {
            "op": "beat",
            "generation": self.current.number,
            "follows": self.follows,
            "report": asdict(self.report),
        }
        if self.follows == self.number:
            message["undecided"] = self.is_undecided(now)
            others = {number for number, peer in self._peers.items() if peer.up and number != WITNESS}
        else:
            others = {self.follows} if self.follows is not None else set()
        since = now - self.patience_s
        heard = {number for number in others if self._peer(number).told >= since}
        self._send(heard, {**message, "hears": True})
        self._send(others - heard, {**message, "hears": False})

    def _learned(self, generation: Generation) -> None:
        """A generation is decided."""
        self.decided.append(generation)
        self._stalled_since = self._changed_since = self._proposed_since = None
        if self.follows == self.number and generation.coordinator != self.number:  # deposed
            self.follows, self._hint = None, generation.coordinator

    def _send(self, numbers: Iterable[int] | None, message: Message) -> None:
        """To some, or to all."""
        chosen = numbers if numbers is not None else [number for number, peer in self._peers.items() if peer.up]
        if receivers := tuple(sorted(chosen)):
            self.outbox.append((receivers, message))
