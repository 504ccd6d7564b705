"""The workers of one host as a group: partials, messages and commits through the arena. One worker is a normal case."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unisono.comm.arena import Arena, Region
from unisono.comm.canonical import Cover
from unisono.comm.copies import Copies
from unisono.comm.header import Agreement, Course, Header, Publication
from unisono.comm.host_layout import CAUSE_BYTES, KNOWN_BYTES, HostLayout
from unisono.comm.mail import Mail
from unisono.comm.partial import Partial, PartialLayout
from unisono.comm.roll import Roll
from unisono.comm.waiting import Waiter
from unisono.comm.words import store_fence
from unisono.errors import GroupError, LaunchError, ReplicaBroken
from unisono.events import PHASES, Event, MicroBatchesCopied
from unisono.plan.roster import Loss, Lot, consecutive
from unisono.run.summation import Node, covering, missing

RECENT = 0.3
"""What the last step counts for in a worker's pace."""


class HostGroup:
    """A `Group` over one arena.

    Attributes:
        survives: the others go on where a worker is lost.
        waits_for_all: no step begins with fewer workers than are wanted.
        interruptible: waits for what needs other hosts too.
        patient: waits without a deadline: the launcher ends who hangs, and all together in the end.
        copies: of late workers' micro-batches; None where none are made.

    Arguments:
        arena, layout: the shared memory and its division.
        partials: the fields of a partial.
        slot: this worker's place in the arena.
        members: the slots of this generation's workers, in order of rank.
        generation: from 1.
        deadline_s: seconds that a wait for these workers may take.
        across_s: seconds that one may take that needs other hosts too; default: the same.
        memory: region -> bytes, where tensors do not lie in the arena itself (a CUDA device's).
        names: what the worker of a slot is called in errors.
        teams: for each part of the model, the crews that compute it: the slots of those who do so together, of whom
            the first one's sums are read; default: each slot computes all of it.
    """

    def __init__(
        self,
        arena: Arena,
        layout: HostLayout,
        partials: PartialLayout,
        slot: int,
        members: Sequence[int],
        generation: int,
        deadline_s: float,
        memory: Callable[[Region], Tensor] | None = None,
        waiter: Waiter | None = None,
        names: Callable[[int], str] = "rank {}".format,
        teams: Sequence[Sequence[Sequence[int]]] | None = None,
        across_s: float | None = None,
    ) -> None:
        self.unlike = ""
        self.arena = arena
        self.layout = layout
        self.header = Header(arena.bytes(layout.regions.named["header"]), layout.slots)
        self.slot = slot
        self.teams = self.all_teams = teams if teams is not None else [[(slot,) for slot in members]]
        replicas = [[slot for team in self.teams for slot in team[number]] for number in range(len(self.teams[0]))]
        self.roll = Roll(self.header, slot, members, replicas)
        self._generation = generation
        self.names = names
        self.partials = partials
        self._memory = memory or (lambda region: arena.tensor(region, torch.uint8))
        self.waiter = replace(
            waiter or Waiter(deadline_s, self.is_revoked),
            revoked=self.is_revoked,
            cause=self.cause,
            over=lambda: self.header.course is Course.OVER,
            told=lambda operation: self.header.note(slot, f"waits in {operation}"),
            beat=lambda: self.header.beat(slot),
        )
        across_s = self.waiter.deadline_s if across_s is None else across_s
        self.interruptible = replace(self.waiter, deadline_s=across_s, revoked=self.interrupted)
        self.patient = replace(self.waiter, deadline_s=float("inf"))
        self._views: dict[tuple[int, int], Partial] = {}
        self._mail = Mail(self.header, lambda box, number: arena.bytes(layout.mailbox(box, number)), slot)
        self.survives = self.waits_for_all = False
        self.copies: Copies | None = None
        self._copied: MicroBatchesCopied | None = None
        self._steps, self._joined = 0, False
        self._told = 0  # losses of the step that the policy has heard of
        self._versions = [arena.words(layout.versions(replica)) for replica in range(layout.replicas)]
        self._reports = arena.bytes(layout.regions.named["reports"]).cast("d")

    @property
    def members(self) -> tuple[int, ...]:
        """The slots of those who train in this step, in order of rank."""
        return self.roll.members

    @property
    def chief(self) -> bool:
        """Whether this worker keeps the run's records."""
        return self.roll.chief == self.slot

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self.members.index(self.slot)

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.members)

    @property
    def generation(self) -> int:
        """The group's number."""
        return self._generation

    def assemble(self, layout_hash: int) -> None:
        """Wait until every member has mapped the arena, and check that all laid it out alike."""
        self.header.set_layout(self.slot, layout_hash)

        def ready() -> list[int] | None:
            seen = [self.header.layout(slot) for slot in self.members]
            return seen if all(seen) else None

        begin = replace(self.waiter, deadline_s=self.deadline_s)  # nobody sees to those who hang yet
        seen = begin(ready, "assemble", lambda: self.missing(lambda s: bool(self.header.layout(s))))
        differing = [rank for rank, value in enumerate(seen) if value != seen[0]]
        if differing:
            raise LaunchError(
                f"{self.names(self.members[differing[0]])} built another model or configuration than "
                f"{self.names(self.members[0])} (other names, "
                "shapes, dtypes, batch sizes or optimizer); the model's factory must not depend on the rank"
            )
        self.header.generation = self._generation

    def join(self, layout_hash: int, prepare: Callable[[], None]) -> int:
        """In place of a worker that was lost, or besides those who train: wait to be let in; the step after which.

        Arguments:
            layout_hash: as of `assemble`.
            prepare: done once this worker has been let in, when the state of that step is whole.

        Raises:
            LaunchError: where this worker has built something else than the others.
            RunOver: where training is over before.
        """
        others = {self.header.layout(slot) for slot in range(self.layout.slots) if slot != self.slot} - {0, layout_hash}
        if others:
            raise LaunchError(
                f"{self.names(self.slot)} cannot join: it built another model or configuration than those who train "
                "(other names, shapes, dtypes, batch sizes or optimizer)"
            )
        self.header.set_layout(self.slot, layout_hash)
        self.header.set_ready(self.slot, True)
        agreement: Agreement = self.patient(self.roll.find_admission, "entry", lambda: "nobody has let it in")
        before = agreement.step - 1
        self.waiter(lambda: True if self._settled(agreement) else None, f"commit of step {before}", self.doing)
        self.roll.join(agreement)
        prepare()
        self.roll.enter()
        self.enter("wait", before + 1)  # its first step, as whoever watches it sees
        self._joined = True
        return before

    def leave_known(self, data: bytes) -> None:
        """Leave what a worker that joins must know besides the state; all members leave the same."""
        words = self.arena.bytes(self.layout.regions.named["known"])
        if len(data) + 8 > KNOWN_BYTES:
            raise ValueError(f"{len(data)} bytes for those who join; there is room for {KNOWN_BYTES - 8}")
        words[8 : 8 + len(data)] = data
        words[:8] = len(data).to_bytes(8, "little")

    def known(self) -> bytes:
        """What was left for those who join."""
        words = self.arena.bytes(self.layout.regions.named["known"])
        return bytes(words[8 : 8 + int.from_bytes(words[:8], "little")])

    def conclude(self) -> None:
        """No step follows: agree on who is the chief from now on."""
        said = self.all_gather(self.header.losses.to_bytes(8, "little"), "agreement on the chief")
        self.roll.conclude([int.from_bytes(word, "little") for word in said if word])

    def begin_work(self) -> None:
        """From here on the others go on where a worker is lost, though no step begins."""
        self.header.train()

    def end(self) -> None:
        """Training is over: nobody joins any more, and nobody is replaced."""
        self.header.course = Course.OVER

    @property
    def asked_to_leave(self) -> bool:
        """Whether the launcher wants this worker to leave."""
        return self.header.asked_to_leave(self.slot)

    @property
    def leaves(self) -> bool:
        """Whether this worker is to leave now, and the others go on."""
        return self.roll.roster is not None and self.roll.leaves

    @property
    def deadline_s(self) -> float:
        """Seconds that a wait may take that needs all, on other hosts too."""
        return self.interruptible.deadline_s

    def _settled(self, agreement: Agreement) -> bool:
        """Whether the state that a worker joins with is whole, and nobody needs what the place's last worker left."""
        return self.is_whole(agreement.step - 1) and self.roll.has_ended(agreement)

    @property
    def owners(self) -> "HostGroup":
        """All of them share one state."""
        return self

    @property
    def on_gradient(self) -> None:
        """Nobody waits for single gradients."""
        return None

    def begin(self, step: int, count: int) -> None:
        """Say what this worker knows, as the step begins."""
        if self.waits_for_all:
            self.patient(lambda: True if self.roll.is_full else None, f"others before step {step}", self.doing)
        self.roll.begin(step, count)
        self._told = 0
        if self.copies is not None:
            self.copies.begin()
        self._mail.begin(step)

    def lot(self) -> Lot:
        """What this worker computes in the step that begins, alone or with others; nothing where its replica is not
        whole and others are."""
        roster = self.roll.roster
        found = roster.lots_of(self.slot) if roster is not None else []
        return found[0] if found else Lot((self.slot,), ())

    def check_replica(self) -> None:
        """Go on only while everyone is alive who computes together with this worker.

        Raises:
            ReplicaBroken: where one is not.
        """
        if self.roll.broken:
            raise ReplicaBroken("a worker of this replica is lost")

    def foretell(self, step: int, micro_batch: int, scalars: Callable[[int], Sequence[float]]) -> None:
        """Nobody needs it before the gradient."""

    def check(self) -> None:
        """Nothing that is computed alone becomes useless here."""

    def enter(self, activity: str, step: int, micro_batch: int | None = None) -> None:
        """Say what this worker does now."""
        self.header.set_activity(self.slot, activity, step, micro_batch)

    def partial(self, entry: int) -> Partial:
        """This worker's buffer number ``entry``."""
        return self.view(self.slot, entry)

    def view(self, slot: int, entry: int) -> Partial:
        """The buffer number ``entry`` of a slot."""
        view = self._views.get((slot, entry))
        if view is None:
            if entry >= self.layout.entries:
                raise GroupError(
                    f"{self.names(slot)} would hold more than {self.layout.entries} sums at once: too many workers "
                    "were lost in one step"
                )
            memory = self._memory(self.layout.partial(slot, entry))
            view = self._views[slot, entry] = Partial(self.partials, memory)
        return view

    def memory(self, name: str) -> Tensor:
        """A region of the arena by its name, as bytes."""
        return self._memory(self.layout.regions.named[name])

    def total(self) -> Partial:
        """Where the sum over all hosts goes."""
        return Partial(self.partials, self.memory("total"))

    def publish(self, step: int, entry: int, node: Node, *, whole: bool = False) -> None:
        """One aligned store: the subtree is complete. After the step is closed, it may have read what changes then."""
        if self.header.closed >= step:
            return
        self.header.publish(self.slot, entry, self._generation, step, node, whole=whole)

    def kept(self, step: int) -> dict[int, list[Node]]:
        """What each slot had published of a step when all workers gave the last generation up, whoever was in it."""
        slots = range(self.layout.slots)
        generation = max(map(self.header.left, slots))
        found = {slot: [p.node for p in self.header.publications(generation, step, [slot])] for slot in slots}
        return {slot: nodes for slot, nodes in found.items() if nodes}

    def keep(self, step: int, kept: Mapping[int, Sequence[Node]]) -> None:
        """Let what was kept count in this generation."""
        for slot, nodes in kept.items():
            for entry, node in enumerate(nodes):
                self.header.publish(slot, entry, self._generation, step, node)

    def published(self, step: int) -> int:
        """How many subtrees of a step this worker has published: the number of its first buffer that is free."""
        return len(self._publications(step, (self.slot,)))

    def collect(self, step: int, count: int, rescue: Callable[[Sequence[int]], None]) -> list[Cover]:
        """Wait for all micro-batches of the step, computing this worker's part of what others left; close it."""
        covers: list[Cover] = []
        copies, copied = self.copies, -1
        waiter = self.waiter
        if self._joined and self._steps == 0:  # others may still evaluate
            waiter = self.patient

        def ready() -> list[int] | None:
            nonlocal copied
            copied = -1
            while len(covers) < len(self.teams):
                cover = self._cover(step, len(covers), count)
                if cover is None:
                    return left_by_others()
                covers.append(cover)
            copying = copies is not None and copies.under_way(step)
            return [] if self.roll.all_have_begun and not copying else None

        def left_by_others() -> list[int] | None:
            nonlocal copied
            lost = self.roll.take_over(lambda lot: self._published_of(step, lot))
            if lost or copies is None:
                return lost or None
            copied = copies.wanted(step)
            return [copied] if copied >= 0 else None

        def absent() -> str:
            if len(covers) == len(self.teams):
                return f"workers have not begun step {step}; {self.doing()}"
            lost = missing(self._published(step, len(covers)), count)
            whose = self._name(len(covers))
            return f"micro-batches {_ranges(lost)} of step {step} are not published{whose}; {self.doing()}"

        while left := waiter(ready, f"collect of step {step}", absent):
            if copies is not None and copied >= 0:
                copies.make(step, copied, lambda left=left: rescue(left))  # type: ignore[misc]
            else:
                rescue(left)
        if self.roll.step == step:
            self.roll.agree()
        self.header.closed = step
        self._copied = copies.news(step) if copies is not None else None
        return covers

    def _cover(self, step: int, team: int, count: int) -> Cover | None:
        found = self._published(step, team)
        chosen = covering(found, count)
        if chosen is None:
            return None
        return [(node, self.view(found[node].slot, found[node].entry)) for node in chosen]

    def _publications(self, step: int, slots: Sequence[int]) -> list[Publication]:
        return self.header.publications(self._generation, step, slots)

    def _published(self, step: int, team: int) -> dict[Node, Publication]:
        """What all of a crew of a team have published, as its first worker has; and what anyone has of the whole."""
        found: dict[Node, Publication] = {}
        for first, *others in self.all_teams[team]:  # whoever is lost has published nothing that does not count
            also = [{p.node for p in self._publications(step, (other,))} for other in others]
            for publication in self._publications(step, (first,)):
                if publication.whole or all(publication.node in nodes for nodes in also):
                    found.setdefault(publication.node, publication)
        for other in range(len(self.teams)) if len(self.teams) > 1 else ():
            if other != team:
                slots = [slot for crew in self.teams[other] for slot in crew]
                whole = (p for p in self._publications(step, slots) if p.whole)
                found.update((p.node, p) for p in whole if p.node not in found)
        return found

    def _published_of(self, step: int, lot: Lot) -> set[int]:
        """Of a lot, the micro-batches that its holders have published: in a pipeline, on every stage."""
        wanted = set(lot.micro_batches)
        alone = len(lot.holders) == 1
        for crews in self.teams:
            slots = lot.holders if alone else next(crew for crew in crews if set(crew) <= set(lot.holders))[:1]
            mine = self._publications(step, slots)  # alone, of the whole model; with others, of what they compute
            nodes = [p.node for p in mine if len(self.teams) == 1 or p.whole == alone]
            wanted &= {m for m in lot.micro_batches if any(node.start <= m < node.stop for node in nodes)}
        return wanted

    def _name(self, team: int) -> str:
        """A team, for an error."""
        return f" by worker {team} of the pipelines" if len(self.teams) > 1 else ""

    def await_published(self, step: int, nodes: Sequence[Node]) -> None:
        """Wait until every team has published all of these subtrees of a step."""

        def absent() -> list[str]:
            lost = [len(set(nodes).difference(self._published(step, team))) for team in range(len(self.teams))]
            return [f"{number} sums of this host{self._name(team)}" for team, number in enumerate(lost) if number]

        self.interruptible(
            lambda: None if absent() else True,
            f"collect of step {step}",
            lambda: f"{', '.join(absent())} are not published; {self.doing()}",
        )

    def distribute(self, step: int, values: Callable[[int, int, int], Tensor]) -> None:
        """Whoever shares the state reads it where it was updated."""

    def finish(self, step: int) -> None:
        """One store: this slot is done with the step."""
        self.header.set_done(self.slot, step)

    def wait_or_lose(
        self,
        ready: Callable[[], bool],
        operation: str,
        absent: Callable[[], str],
        grace_s: float = 0.0,
        progress: Callable[[], object] | None = None,
    ) -> Sequence[Loss]:
        """Wait until something is ready, once every micro-batch of the step is published.

        Returns the workers that were lost since the step began, each once; none once it is ready.

        Arguments:
            grace_s: as of `all_gather`.
            progress: as of `Waiter`.
        """

        def ready_or_lost() -> Sequence[Loss] | None:
            if ready():
                return ()
            self.roll.take_over(None)
            told, self._told = self._told, len(self.roll.losses)
            return self.roll.losses[told:] or None

        waiter = replace(self.waiter, deadline_s=self.waiter.deadline_s + grace_s)
        return waiter(ready_or_lost, operation, absent, progress)

    def settle(self, step: int, grace_s: float = 0.0) -> Sequence[Loss]:
        """Wait for everyone's `finish`, and for the heirs of those who were lost.

        Arguments:
            grace_s: as of `all_gather`.
        """

        def finished(slot: int) -> bool:
            return self.header.done(slot) >= step or self.roll.is_lost(slot)

        def ready() -> bool:
            if not all(map(finished, self.members)):
                return False
            return not any(map(self.roll.is_lost, self.members)) or self.is_whole(step)

        absent = "those who take over from lost workers are not done"
        lost = self.wait_or_lose(ready, f"commit of step {step}", lambda: self.missing(finished) or absent, grace_s)
        if not lost:
            self.header.committed = step
        return lost

    def is_whole(self, step: int) -> bool:
        """Whether every block of the state that all share is at ``step``."""
        return len(self._versions) > 1 or all(version >= step for version in self._versions[0])

    def set_flags(self, flags: int) -> None:
        """Requests to go with the next step."""
        self.header.set_flags(self.slot, flags)

    def all_flags(self) -> int:
        """Everyone's requests joined: as of the step's close where it was begun with this group."""
        return self.roll.flags if self.roll.roster is not None else self.flags_by_now()

    def flags_by_now(self) -> int:
        """Requests joined of all whose subtrees of the step have been seen."""
        return functools.reduce(operator.or_, map(self.header.flags, self.members))

    def all_gather(self, payload: bytes, operation: str, grace_s: float = 0.0) -> list[bytes]:
        """Everyone's payload; that of a worker that was lost is empty.

        Arguments:
            grace_s: added to the deadline, where a member may first have to wait for another host.
        """
        return self._mail.exchange(
            payload, self.members, lambda number: self._wait_for_messages(number, operation, grace_s)
        )

    def _wait_for_messages(self, number: int, operation: str, grace_s: float) -> None:
        def arrived(slot: int) -> bool:
            return self.header.sequence(slot) >= number

        def ready() -> bool | None:
            return True if all(arrived(slot) or self.roll.is_lost(slot) for slot in self.members) else None

        waiter = replace(self.interruptible, deadline_s=self.deadline_s + grace_s)
        waiter(ready, operation, lambda: self.missing(lambda slot: arrived(slot) or self.roll.is_lost(slot)))

    def barrier(self, operation: str) -> None:
        """An exchange of nothing."""
        self.all_gather(b"", operation)

    def broadcast(self, tensor: Tensor, operation: str) -> None:
        """There is one host, and its workers share what they have."""

    @property
    def wire_use(self) -> None:
        """No bytes leave the host."""
        return None

    def news(self) -> list[Event]:
        """Workers that were lost, have joined or left, and micro-batches that were copied."""
        copied, self._copied = self._copied, None
        return [*self.roll.news(), *([copied] if copied is not None else [])]

    def report(self, step: int, seconds: Sequence[float]) -> None:
        """Two rows in turn, so that a reader of the settled step is not overtaken."""
        self._note_pace(seconds)
        start = (self.slot * 2 + step % 2) * len(PHASES)
        for i, value in enumerate(seconds):
            self._reports[start + i] = value

    def _note_pace(self, seconds: Sequence[float]) -> None:
        """How long a micro-batch takes this worker: its recent steps count most, its first one does not."""
        computed = self._cost(self.slot)
        self._steps += 1
        if computed and self._steps > 1:
            pace = sum(seconds[PHASES.index(phase)] for phase in ("data", "compute")) / computed
            self.roll.pace_s += (pace - self.roll.pace_s) * (RECENT if self.roll.pace_s else 1.0)

    def reports(self, step: int) -> list[list[float]]:
        """Seconds in each phase, a list for each rank."""
        starts = [(slot * 2 + step % 2) * len(PHASES) for slot in self.members]
        return [list(self._reports[start : start + len(PHASES)]) for start in starts]

    def work(self) -> Mapping[int, int]:
        """How many micro-batches each worker had in the last step, by slot."""
        return {slot: self._computed(slot) for slot in self.members} if self.roll.roster is not None else {}

    def _cost(self, slot: int) -> float:
        """What the micro-batches that a slot's worker has computed in the step come to: 1 each, or what they cost."""
        if self.roll.costs is None:
            return self._computed(slot)
        costs = self.roll.costs(self.roll.step)
        nodes = (p.node for p in self._publications(self.roll.step, (slot,)))
        return sum(sum(costs[node.start : node.stop]) for node in nodes)

    def _computed(self, slot: int) -> int:
        """How many micro-batches a slot's worker has computed, and published, in the step."""
        nodes = (p.node for p in self._publications(self.roll.step, (slot,)))
        return sum(min(node.stop, self.roll.count) - node.start for node in nodes)

    def gather_compression(self) -> dict[str, Tensor]:
        """Nothing is compressed."""
        return {}

    def restore_compression(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is compressed."""

    def close(self, cause: BaseException | None = None) -> None:
        """The memory is let go of with its last view."""

    def revoke(self, cause: str = "") -> None:
        """One store, which every wait polls; the first cause that was given goes into everyone's error."""
        words = self.arena.bytes(self.layout.regions.named["cause"])
        if cause and not self.is_revoked():
            text = cause.encode()[: CAUSE_BYTES - 2]
            words[2 : 2 + len(text)] = text
            words[:2] = len(text).to_bytes(2, "little")
        store_fence()
        self.header.revoked = self._generation + 1

    def is_revoked(self) -> bool:
        """Whether this generation has ended."""
        return self.header.revoked > self._generation

    def interrupted(self) -> bool:
        """Whether it has, or other hosts than before are to train, or hosts are missing without which none can."""
        header = self.header
        return self.is_revoked() or header.hosts_generation > self._generation or header.undecided

    def gets_nowhere(self) -> bool:
        """Whether to wait on for other hosts is of no use; asked again and again, it is a sign of life."""
        self.header.beat(self.slot)
        return self.interrupted()

    def advance(self, generation: int, members: Sequence[int]) -> None:
        """Others than before train from now on, on this host or elsewhere: what was published or said is void."""
        self._generation = generation
        self.teams = [[crew for crew in team if set(crew) <= set(members)] for team in self.all_teams]
        self.roll.renew(members)
        self._mail.begin_generation(generation)

    def cause(self) -> str:
        """Why it has, where that was said."""
        words = self.arena.bytes(self.layout.regions.named["cause"])
        return bytes(words[2 : 2 + int.from_bytes(words[:2], "little")]).decode(errors="replace")

    def reform(self, generation: int, members: Sequence[int]) -> "HostGroup":
        """The next generation over the same memory."""
        if generation <= self._generation:
            raise ValueError(f"generation {generation} is not after {self._generation}")
        group = HostGroup(
            self.arena,
            self.layout,
            self.partials,
            self.slot,
            members,
            generation,
            self.waiter.deadline_s,
            self._memory,
            self.waiter,
            self.names,
            [[crew for crew in team if set(crew) <= set(members)] for team in self.teams],
            self.deadline_s,
        )
        self.header.generation = generation
        return group

    def missing(self, arrived: Callable[[int], bool]) -> str:
        """Whose slot has not arrived, and what they did last."""
        late = [slot for slot in self.members if not arrived(slot)]
        return "; ".join(f"{self.names(slot)} is missing, last seen in {self.header.activity(slot)}" for slot in late)

    def describe(self, rank: int) -> str:
        """A worker, with what it did last."""
        slot = self.members[rank]
        return f"{self.names(slot)}, last seen in {self.header.activity(slot)},"

    def doing(self) -> str:
        """What the others did last."""
        others = [slot for slot in self.members if slot != self.slot and not self.roll.is_lost(slot)]
        return ", ".join(f"{self.names(slot)}: {self.header.activity(slot)}" for slot in others)


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges.

    >>> _ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    return ", ".join(str(r.start) if len(r) == 1 else f"{r.start}-{r.stop - 1}" for r in consecutive(numbers))
