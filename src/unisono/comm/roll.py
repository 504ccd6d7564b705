"""Who trains on a host, as one worker sees it: how losses become known, and how all agree on who begins the next step.

Nobody is asked: everything is decided from words of the arena. The launcher writes down each worker that is dead, in
one order for all; what a dead worker has left is final. Each worker says, as it begins a step, how many losses it knows
of and who waits to be let in; when all micro-batches of the step are published, everyone has said so, and all draw the
same conclusion. A loss that is not agreed on yet is handled inside the step.
"""

from collections.abc import Callable, Iterable, Sequence

from unisono.comm.group import LEAVE
from unisono.comm.header import Agreement, Course, Header
from unisono.errors import RunOver
from unisono.events import Event, MembersChanged, WorkerLost
from unisono.plan.roster import Loss, Lot, StepRoster, next_members, whole_replicas

REBALANCE_STEPS = 4
"""How often shares may follow the workers' speed: it takes 60 us."""


class Roll:
    """One worker's.

    Arguments:
        header: the arena's words.
        slot: this worker's place.
        members: the slots of those who begin.
        replicas: the slots of each.

    Attributes:
        members: who began this step; between two steps, who ended the last.
        chief: the slot of the worker that keeps the run's records.
        step, count: the one under way, or the last, and its micro-batches.
        flags: everyone's requests of the step, joined, once it is closed.
        pace_s: seconds that a micro-batch takes this worker, to be said as it begins a step; 0 where it is not known.
        costs: of the micro-batches of a step, 1 on the average, where it is known that they differ.
        regained: called with the number of a replica that is whole again, before anyone begins the step with it.
    """

    def __init__(self, header: Header, slot: int, members: Sequence[int], replicas: Sequence[Sequence[int]]) -> None:
        self._header = header
        self._slot = slot
        self._replicas = replicas
        self.members = tuple(members)
        self.chief = self.members[0]
        self.step = self.count = 0
        self.flags = 0
        self.costs: Callable[[int], Sequence[float]] | None = None
        self.regained: Callable[[int], None] = lambda replica: None
        self._seen = self._handled = 0  # losses that the members take account of, and those that this step does
        self._agreed = Agreement(0, 0, self.chief, self.members)
        self.roster: StepRoster | None = None
        self._news: list[Event] = []
        self._paces: dict[int, float] = {}  # agreed on; none where others than before begin: those who join know none
        self._in_force: dict[int, float] = {}  # the paces that shares follow until they are looked at again
        self.pace_s = 0.0

    def renew(self, members: Sequence[int]) -> None:
        """Others than before train from now on, as was decided elsewhere; who is lost by now is not among them."""
        self.members = tuple(members)
        self._seen = self._handled = self._header.losses
        self.roster, self._paces = None, {}

    def begin(self, step: int, count: int) -> None:
        """A step begins, with those who were agreed on."""
        if self._agreed.step == step:
            self._note_change(self._agreed)
            self.members, self.chief, self._seen = self._agreed.members, self._agreed.chief, self._agreed.seen
        self.step, self.count, self._handled = step, count, self._seen
        before = self.roster.first if self.roster is not None and self._paces else ()
        if step % REBALANCE_STEPS == 0 or not self._paces:
            self._in_force = self._paces
        if self.costs is not None:
            costs = self.costs(step)
            self.roster = StepRoster(self._replicas, self.members, count, self._in_force, costs=costs)
        else:
            paces = self._paces if step % REBALANCE_STEPS == 0 else None
            self.roster = StepRoster(self._replicas, self.members, count, paces, before)
        header = self._header
        seen = header.losses
        dead = {header.lost(number) for number in range(self._handled, seen)}
        present = set(self.members) - dead
        ready = self._ready(present)
        header.say_hello(self._slot, step, seen, ready, self.pace_s)
        header.train()

    def _ready(self, present: set[int]) -> list[int]:
        """Those who may be let in: as many as are wanted."""
        header = self._header
        ready = [slot for slot in range(header.slots) if slot not in present and header.ready(slot)]
        return ready[: max(0, header.wanted - len(present))] if header.wanted else ready

    @property
    def is_full(self) -> bool:
        """Whether as many as are wanted train, or are ready to."""
        header = self._header
        lost = {header.lost(number) for number in range(self._agreed.seen, header.losses)}
        present = set(self._agreed.members) - lost
        return len(present) + len(self._ready(present)) >= header.wanted

    def _note_change(self, agreed: Agreement) -> None:
        before, after = set(self.members), set(agreed.members)
        lost = {self._header.lost(number) for number in range(self._seen, agreed.seen)}
        joined, left = sorted((after - before) | (after & lost)), sorted(before - after - lost)
        if joined or left or before - after:
            self._news.append(MembersChanged(agreed.step, agreed.members, joined, left))

    def news(self) -> list[Event]:
        """What has happened since it was last asked."""
        news, self._news = self._news, []
        return news

    def is_lost(self, slot: int) -> bool:
        """Whether a member's worker is dead, agreed on or not."""
        header = self._header
        return any(header.lost(number) == slot for number in range(self._seen, header.losses))

    @property
    def broken(self) -> bool:
        """Whether one of those who compute together with this worker is lost."""
        if self.roster is None or self._handled == self._header.losses:
            return False
        return any(self.is_lost(mate) for mate in self.roster.mates(self._slot))

    def take_over(self, published: Callable[[Lot], set[int]] | None) -> list[int]:
        """Handle the losses that have become known: the micro-batches that this worker is to compute.

        Arguments:
            published: of a lot, those of which nothing is missing; None where nothing is missing of the step.
        """
        mine: list[int] = []
        header, roster = self._header, self.roster
        while roster is not None and self._handled < header.losses:
            slot, number = header.lost(self._handled), self._handled
            if slot in roster.living:
                if published is not None and not self._have_halted(roster.mates(slot), number):
                    break
                taken = roster.lose(slot, published or (lambda lot: set(lot.micro_batches)))
                mine += taken.get(self._slot, ())
                given = {heir: list(part) for heir, part in taken.items() if part}
                self._news.append(WorkerLost(number, self.step, slot, header.how(number), given))
            self._handled += 1
        return mine

    def _have_halted(self, mates: Sequence[int], number: int) -> bool:
        """Whether nothing more is published of what a lost worker's mates computed with it."""
        header = self._header
        if self._slot in mates and header.halted(self._slot) <= number:
            header.halt(self._slot, number + 1)
        return all(header.halted(mate) > number or self.is_lost(mate) for mate in mates)

    @property
    def losses(self) -> Sequence[Loss]:
        """Those of this step that have been handled, in order."""
        return self.roster.losses if self.roster is not None else ()

    @property
    def all_have_begun(self) -> bool:
        """Whether every member that lives has said what it knew as it began the step."""
        return all(self._header.hello(slot) == self.step or self.is_lost(slot) for slot in self.members)

    def agree(self) -> None:
        """The step is closed: conclude who begins the next, as all others do."""
        header = self._header
        said = [slot for slot in self.members if header.hello(slot) == self.step]
        seen = max(header.seen(slot) for slot in said)
        flags = {slot: header.flags(slot) for slot in said}
        self.flags = 0
        for value in flags.values():
            self.flags |= value & ~LEAVE
        lost = [header.lost(number) for number in range(self._seen, seen)]
        admitted = {slot for member in said for slot in header.admitted(member)}
        leaving = [slot for slot, value in flags.items() if value & LEAVE]
        members = next_members(self.members, lost, admitted, leaving)
        stay = [slot for slot in members if slot in self.members and slot not in lost]
        chief = self.chief if self.chief in stay else self._successor(stay or members)
        self._agreed = Agreement(self.step + 1, seen, chief, members)
        self._paces = {slot: header.pace_s(slot) for slot in said} if members == self.members and not lost else {}
        if members != self.members or lost:
            header.agree(self._agreed)
        for replica in set(whole_replicas(self._replicas, members)) - set(whole_replicas(self._replicas, stay)):
            self.regained(replica)

    @property
    def leaves(self) -> bool:
        """Whether this worker is not among those who begin the next step."""
        return self._slot not in self._agreed.members

    def conclude(self, seen: Sequence[int]) -> None:
        """No step follows: agree on the chief from the losses that each knew of."""
        header = self._header
        most = max(seen)
        lost = {header.lost(number) for number in range(self._seen, most)}
        if self.chief in lost:
            self.chief = self._successor(set(self.members) - lost)

    def _successor(self, slots: Iterable[int]) -> int:
        """The one who has trained for the longest: it knows of all steps that those before it did not record."""
        return min(slots, key=lambda slot: (self._header.since(slot), slot))

    def find_admission(self) -> Agreement | None:
        """For a worker that waits to be let in: the agreement that does so.

        Raises:
            RunOver: where training ended before.
        """
        header = self._header
        if header.course is Course.OVER:
            raise RunOver("training was over before this worker could join")
        agreement = next(iter(header.agreements()), None)  # one before may be about who was here earlier
        if agreement is None or self._slot not in agreement.members:
            return None
        died = any(header.lost(number) == self._slot for number in range(agreement.seen, header.losses))
        return None if died else agreement

    def join(self, agreement: Agreement) -> None:
        """This worker is to begin with the step that the agreement is for."""
        self._header.set_since(self._slot, agreement.step)
        self._agreed, self.step = agreement, agreement.step - 1
        self.members, self.chief, self._seen = agreement.members, agreement.chief, agreement.seen

    def enter(self) -> None:
        """This worker has all that the step before has left."""
        self._header.set_done(self._slot, self.step)
        self._header.set_ready(self._slot, False)

    def has_ended(self, agreement: Agreement) -> bool:
        """Whether all who trained the step before an agreement's have ended it: they read nothing of it any more.

        Others who join with this worker are ready, or have said that they are done.
        """
        header = self._header
        lost = {header.lost(number) for number in range(agreement.seen, header.losses)}
        others = set(agreement.members) - lost - {self._slot}
        return all(header.done(slot) >= agreement.step - 1 or header.ready(slot) for slot in others)
