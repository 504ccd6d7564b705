"""One launcher's vote on generations and, as the coordinator, its proposals: what is said of them. No I/O."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unisono.fault.generation import Acceptor, Ballot, Electorate, Generation, Proposal, ballot

Message = dict[str, Any]

PROPOSAL_S = 1.0
"""Until a proposal that is not decided is given up."""


class Voting:
    """One launcher's.

    Arguments:
        number: of this host.
        acceptor: its vote, which knows the generation that began.
        send: a message to some launchers, or (None) to all that are reached.
        learned: called with each generation that is decided, once.

    Attributes:
        abstains: it may have voted before, and does not know: it does not vote until it is no member.
    """

    def __init__(
        self,
        number: int,
        acceptor: Acceptor,
        send: Callable[[Iterable[int] | None, Message], None],
        learned: Callable[[Generation], None],
    ) -> None:
        self.acceptor = acceptor
        self.abstains = False
        self._number = number
        self._send = send
        self._learned = learned
        self._learned_at = float("-inf")
        self._proposed: tuple[Proposal, float] | None = None
        self._carried: Proposal | None = None  # this launcher's last, where no other was begun since
        self._attempt = 0

    @property
    def _current(self) -> Generation:
        return self.acceptor.current

    def proposes(self, now: float) -> bool:
        """Whether a proposal is under way."""
        if self._proposed is not None and now - self._proposed[1] > PROPOSAL_S:
            self._proposed = None
        return self._proposed is not None

    def give_up(self) -> None:
        """What was proposed cannot be decided."""
        self._proposed = None

    def propose(self, wanted: Generation, voters: Iterable[int], electorate: Electorate, now: float) -> None:
        """Begin to bring about the next generation; at once where a quorum has promised by voting for the last."""
        carried, self._carried = self._carried, None
        if (
            carried is not None
            and (carried.sent, carried.ballot) == (self._current, self.acceptor.promised)
            and electorate.is_quorum(carried.voters)
        ):
            proposal = Proposal(wanted, carried.ballot, electorate, sent=wanted)
            self._proposed = proposal, now
            self._ask_to_accept(proposal, now)
            return
        self._attempt = max(self._attempt, self.acceptor.promised[0]) + 1
        own: Ballot = (self._attempt, self._number)
        proposal = Proposal(wanted, own, electorate)
        self._proposed = proposal, now
        self._send([number for number in voters if number != self._number], self._question(proposal))
        before = self.acceptor.accepted
        if self.acceptor.promise(wanted.number, own):
            self._promised(self._number, wanted.number, own, before, now)

    def heard(self, number: int, message: Mapping[str, Any], now: float, *, promises: bool) -> None:
        """A message has come from another.

        Arguments:
            promises: whether this launcher may follow that one.

        Raises:
            ValueError: for what no launcher sends.
        """
        match message.get("op"):
            case "prepare":
                may = promises and not self.abstains
                self._asked_to_promise(number, whole(message["number"]), ballot(message["ballot"]), may=may)
            case "accept":
                self._asked_to_accept(number, message["change"], ballot(message["ballot"]))
            case "promise":
                told = message["accepted"]
                if message["number"] == self._current.number + 1:
                    accepted = None if told is None else (ballot(told["ballot"]), self._current.changed(told["change"]))
                    self._promised(number, message["number"], ballot(message["ballot"]), accepted, now)
            case "accepted":
                self._accepted(number, message["number"], ballot(message["ballot"]), now)
            case "refused":
                self._refused(number, whole(message["number"]), whole(message["knows"]), ballot(message["promised"]))
            case "decided":
                mine, wanted = self.acceptor.accepted, (ballot(message["ballot"]), whole(message["number"]))
                if mine is not None and (mine[0], mine[1].number) == wanted:
                    self._learn(mine[1], now)
                elif wanted[1] > self._current.number:
                    self._refuse(number, wanted[1])
            case "generation":
                self._learn(Generation.read(message["generation"]), now)
            case other:
                raise ValueError(f"no launcher sends {other!r}")

    def compare(self, number: int, theirs: int, before: float = float("inf")) -> None:
        """Tell one that is behind; not of what was decided after ``before``, which may be on its way."""
        if theirs < self._current.number and self._learned_at < before:
            self._send([number], {"op": "generation", "generation": self._current.written()})

    def _asked_to_promise(self, number: int, wanted: int, asked: Ballot, *, may: bool) -> None:
        before = self.acceptor.accepted
        if may and self.acceptor.promise(wanted, asked):
            accepted = None
            if before is not None:
                accepted = {"ballot": list(before[0]), "change": before[1].change(self._current)}
            self._send([number], {"op": "promise", "number": wanted, "ballot": list(asked), "accepted": accepted})
        else:
            self._refuse(number, wanted)

    def _asked_to_accept(self, number: int, change: Mapping[str, Any], asked: Ballot) -> None:
        wanted = whole(change["number"])
        may = wanted == self._current.number + 1 and not self.abstains
        if may and self.acceptor.accept(asked, self._current.changed(change)):
            self._send([number], {"op": "accepted", "number": wanted, "ballot": list(asked)})
        else:
            self._refuse(number, wanted)

    def _refuse(self, number: int, wanted: int) -> None:
        self.compare(number, wanted - 1)
        knows, promised = self._current.number, list(self.acceptor.promised)
        self._send([number], {"op": "refused", "number": wanted, "knows": knows, "promised": promised})

    def _refused(self, voter: int, number: int, knows: int, promised: Ballot) -> None:
        self._attempt = max(self._attempt, promised[0])
        proposal = self._proposed[0] if self._proposed is not None else None
        if proposal is None or number != proposal.wanted.number:
            self.compare(voter, knows)
        elif promised > proposal.ballot:
            self._proposed = None
        elif knows < number - 1:  # it is told, and may vote then; whose disk is full does not hold up the others
            self.compare(voter, knows)
            self._send([voter], self._question(proposal))

    def _question(self, proposal: Proposal) -> Message:
        """What voters are asked."""
        own = list(proposal.ballot)
        if proposal.sent is None:
            return {"op": "prepare", "number": proposal.wanted.number, "ballot": own}
        return {"op": "accept", "change": proposal.sent.change(self._current), "ballot": own}

    def _ask_to_accept(self, proposal: Proposal, now: float) -> None:
        assert proposal.sent is not None
        self._send(None, self._question(proposal))
        if self.acceptor.accept(proposal.ballot, proposal.sent):
            self._accepted(self._number, proposal.sent.number, proposal.ballot, now)

    def _promised(
        self, voter: int, number: int, own: Ballot, accepted: tuple[Ballot, Generation] | None, now: float
    ) -> None:
        proposal = self._spoken_of(number, own)
        if proposal is not None and proposal.promised(voter, accepted):
            self._ask_to_accept(proposal, now)

    def _accepted(self, voter: int, number: int, own: Ballot, now: float) -> None:
        carried = self._carried
        if carried is not None and (self._current.number, carried.ballot) == (number, own):
            carried.accepted(voter)  # late, and counts for the next
            return
        proposal = self._spoken_of(number, own)
        if proposal is None or not proposal.accepted(voter):
            return
        assert proposal.sent is not None
        self._learn(proposal.sent, now)
        self._carried = proposal
        self._send(None, {"op": "decided", "number": number, "ballot": list(own)})

    def _spoken_of(self, number: int, own: Ballot) -> Proposal | None:
        """The proposal under way, where a message is about it."""
        proposal = self._proposed[0] if self._proposed is not None else None
        return proposal if proposal is not None and (proposal.wanted.number, proposal.ballot) == (number, own) else None

    def _learn(self, generation: Generation, now: float) -> None:
        """A generation is decided."""
        if not self.acceptor.learn(generation):
            return
        self._learned_at = now
        self.abstains = self.abstains and self._number in generation.hosts
        self._proposed = self._carried = None
        self._learned(generation)


def whole(value: Any) -> int:
    """A number of a message.

    Raises:
        ValueError: for what is none.
    """
    if type(value) is not int:
        raise ValueError(f"not a number: {value!r}")
    return value
