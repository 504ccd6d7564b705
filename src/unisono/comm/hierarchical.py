"""The workers of several hosts as a group: the arena inside a host, a network between hosts, exact.

Every host holds the whole training state, or hosts share one (`plan.shards`); its workers own and update what it keeps.
What crosses the network is the step's gradient: each local rank, in its lane, sums its buckets with its like on the
other hosts, while the backward still runs (`comm.crossing`). With one worker on every host this is a plain network
group: one code path for both.

Where every host has the whole state, others go on when one is lost. Their launchers decide who does; whoever waits for
another host learns of it, lets go of its wires, makes new ones, and compares with the others how far each is: one that
lacks a step which others have committed gets the state from them. Then the step that was under way is done again.
"""

import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisono.comm.algorithms import as_tensor
from unisono.comm.canonical import Cover
from unisono.comm.crossing import Crossing, Terms
from unisono.comm.exchange import TAGS_A_BUCKET
from unisono.comm.group import PACKED
from unisono.comm.header import Course
from unisono.comm.heads import join, split
from unisono.comm.host import HostGroup
from unisono.comm.leaders import Leaders
from unisono.comm.packing import Trial
from unisono.comm.partial import Partial, item_size
from unisono.comm.patience import GRACE_S
from unisono.comm.reductions import Compressed
from unisono.comm.values import Values
from unisono.comm.wire_state import WireState, gathered, restore, wire_regions, wire_state
from unisono.errors import GroupError, LaunchError, Regrouped, RunOver
from unisono.events import PHASES, Event, HostsChanged, WireUse
from unisono.plan.continuation import Continuation, continuation
from unisono.plan.hosts import Hosts, Place
from unisono.plan.roster import Loss
from unisono.plan.shards import Piece
from unisono.run.summation import Node, root

T = TypeVar("T")
View = Callable[[int, int, int], Tensor]
"""(segment, start, stop) -> the parameters that lie there."""

IDLE_S = 1.0
"""A chief that waits longer for the others lets go of the run's records: others may go on without it."""
MOST_TRIES = 5
SOME_S = 0.5
"""How often the workers of a host hear that a large exchange goes on."""
POLL_S = 1e-3


@dataclass(frozen=True, slots=True)
class Continuity:
    """What a worker has to say and to give when other hosts than before go on.

    Attributes:
        parts: the host's state, for a copy elsewhere.
        versions: of its blocks.
        say: what the worker knows of the run besides: "evaluated", the last step that was; "chief", whether it keeps
            the records; "outcome", of its last step, None where it has done none; "ends", why no step follows.
        idle: called while it cannot go on.
    """

    parts: Callable[[], list[Tensor]]
    versions: memoryview
    say: Callable[[], dict[str, Any]] = lambda: {"evaluated": -1, "chief": False, "outcome": None, "ends": ""}
    idle: Callable[[], None] = lambda: None


class HierarchicalGroup:
    """A `Group` over several hosts.

    Arguments:
        local: the workers of this host.
        place: this worker among all that there can be.
        terms: what is exchanged.
        joins: those who train already; see `enter_run`.

    Attributes:
        place: this worker among those of this generation.
        continuity: what goes on with other hosts; None until it is known.
    """

    def __init__(self, local: HostGroup, place: Place, terms: Terms, *, joins: bool = False) -> None:
        self.unlike = ""
        self.local = local
        self.local.names = place.local_name
        self.place = place
        self.continuity: Continuity | None = None
        self._all = place  # among all that there can be
        self._terms = terms
        flat, way, shards = terms.flat, terms.way, terms.shards
        self._rounds = shards.rounds if shards is not None else 0
        self._replica = local.size // len(local.teams[0])  # workers of one
        self._total = local.total()
        self._use = WireUse(0, 0.0, 0.0)
        self._began, self._flags = 0.0, 0
        self._chief = 0  # the rank of the worker that keeps the records
        self._news: list[Event] = []
        self._known = b"{}"
        self._joins = joins
        self._slots: Mapping[int, Sequence[int]] = {}
        self._continued: tuple[int, Continuation | None] = (0, None)  # the step that others had begun, and its rest
        self._failed_at: tuple[Hosts, int] = (place.hosts, -1)
        self._tries = 0
        self._trial = Trial() if way.lossless == "auto" and place.rank == 0 else None
        self._wire_state: WireState | None = None
        if way.compression is not None:
            regions = wire_regions(flat, way.compression)
            self._wire_state = wire_state(flat, way.compression, regions, local.memory("wire"))
        if shards is not None and local.size == 1:  # what is summed here takes the place of what was sent
            shares = Crossing.shares(terms, local, place)
            first = self._rounds + 1 if self._rounds else shares[place.host].parts[0].entry
            self._total = self._total.over(local.view(local.slot, first))
        self._crossing: Crossing | None = None if joins else self._cross()

    def _cross(self) -> Crossing:
        """Make this generation's wires."""
        return Crossing(self._terms, self.local, self.place, self._total, self._wire_state)

    @property
    def crossing(self) -> Crossing:
        """This generation's."""
        assert self._crossing is not None
        return self._crossing

    @property
    def rank(self) -> int:
        """This worker's world rank."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Workers on all hosts."""
        return self.place.hosts.size

    @property
    def members(self) -> Sequence[int]:
        """The slots of this host's workers."""
        return self.local.members

    @property
    def generation(self) -> int:
        """The group's number."""
        return self.local.generation

    @property
    def owners(self) -> HostGroup:
        """The workers of this host, who share its state."""
        return self.local

    @property
    def on_gradient(self) -> Callable[[int], None]:
        """Counts down the uses of each bucket; the last one sends it on its way."""
        return self.crossing.readiness.gradient_is_final

    @property
    def leaders(self) -> Leaders:
        """On the first worker of every host: what says something to the others between steps."""
        return self.crossing.leaders

    @property
    def wire_use(self) -> WireUse:
        """What the last step's exchange took."""
        return self._use

    @property
    def chief(self) -> bool:
        """Whether this worker keeps the run's records."""
        return self.rank == self._chief

    def enter(self, activity: str, step: int, micro_batch: int | None = None) -> None:
        """Say what this worker does now."""
        self.local.enter(activity, step, micro_batch)

    def begin(self, step: int, count: int) -> None:
        """Let the exchange of a step begin as its buckets come.

        Raises:
            Regrouped: where other hosts have done this step already.
        """
        if self._terms.survives and (self.local.interrupted() or self.crossing.closed):
            change = self._regroup(GroupError("other hosts than before go on"))
            if change.step >= step:
                raise change
        self.local.roll.begin(step, count)
        self._began = time.perf_counter()
        crossing = self.crossing
        if crossing.packed is not None:
            crossing.packed.on = self._terms.way.lossless == "always" or bool(self._flags & PACKED)
        crossing.follow(self._rest(step))
        crossing.begin(step)

    def _rest(self, step: int) -> Continuation | None:
        number, continued = self._continued
        return continued if number == step else None

    def rest(self) -> tuple[Sequence[int], int] | None:
        """What this worker computes of a step that others have begun, and its first buffer that is free for it."""
        continued = self._rest(self.local.roll.step)
        return None if continued is None else (continued.left[self.rank], continued.first[self.rank])

    def check(self) -> None:
        """What a worker has begun counts, whichever hosts go on with the step."""

    def foretell(self, step: int, micro_batch: int, scalars: Callable[[int], Sequence[float]]) -> None:
        """Where hosts keep their gradients to themselves, the others may know already."""
        self.crossing.foretell(step, micro_batch, scalars)

    def partial(self, entry: int) -> Partial:
        """This worker's buffer number ``entry``; in rounds all share the memory of one gradient, one after another."""
        if self._rounds == 0:
            return self.local.partial(entry)
        readiness = self.crossing.readiness
        if entry > 0:
            readiness.await_summed(len(self.crossing.buckets), entry - 1)
        return self.crossing.leaf(entry)

    def publish(self, step: int, entry: int, node: Node, *, whole: bool = False) -> None:
        """The subtree is complete; with this worker's last one, so are all its buckets."""
        self.local.publish(step, entry, node, whole=whole)
        crossing = self.crossing
        if self._rounds or node == crossing.own_nodes()[-1]:
            crossing.readiness.end()

    def published(self, step: int) -> int:
        """How many subtrees of a step this worker has published."""
        return self.local.published(step)

    def collect(self, step: int, count: int, rescue: Callable[[Sequence[int]], None]) -> list[Cover]:
        """Wait until the exchange is over: one subtree, the whole, in this host's total.

        Where replicas train apart, that holds what is no gradient, and the gradients are those of this host's replicas:
        two covers (see `plan.assignment.apart_teams`).

        Raises:
            Regrouped: where hosts are lost or have come, and the step is to be done again, or was done by others.
        """
        try:
            self._await_exchange(step)
        except GroupError as error:
            if not self._terms.survives:
                raise
            self._give_up_together(step)
            if not self.crossing.is_complete:
                raise self._regroup(error) from error
        crossing = self.crossing
        if self._trial is not None and crossing.packed is not None:
            self._trial.note(crossing.packed.on, time.perf_counter() - self._began)
        self._flags = crossing.flags
        self.local.header.closed = step
        summed: Cover = [(root(count), self._total)]
        return [self._own_cover(), summed] if self._terms.is_apart(step) else [summed]

    def _own_cover(self) -> Cover:
        """The gradients that this host keeps to itself: of what others have computed there is nothing here."""
        crossing, local = self.crossing, self.local
        crews, shares = crossing.crews[crossing.team], crossing.plan.shares
        own = [(part.node, local.view(crews[part.replica][0], part.entry)) for part in shares[self.place.host].parts]
        others = (share for host, share in enumerate(shares) if host != self.place.host)
        return [*own, *((node, self._nothing) for share in others for node in share.nodes)]

    @functools.cached_property
    def _nothing(self) -> Partial:
        """A partial without values, whose memory nobody touches."""
        layout = self.local.partials
        return Partial(layout, torch.zeros(layout.size_bytes, dtype=torch.uint8))

    def _await_exchange(self, step: int) -> None:
        """The exchange's own deadline begins when this host has computed everything: stages end one after another."""
        crossing = self.crossing
        if not self._rounds:
            with crossing.patience.telling():
                parts = crossing.plan.shares[self.place.host].parts
                self.local.await_published(step, [part.node for part in parts])
        arrived = time.perf_counter()
        crossing.patience.wait(
            lambda: True if crossing.is_complete else None, crossing.running, f"exchange of step {step}"
        )
        if crossing.has_lane:
            self._use = self._measured(crossing, time.perf_counter() - arrived)

    def _measured(self, crossing: Crossing, exposed_s: float) -> WireUse:
        saved, norm, sent = 0, None, crossing.take_sent_bytes()
        if isinstance(crossing.reduce, Compressed):
            hosts, item_bytes = len(self.place.hosts.sizes), self._terms.flat.segment_dtypes
            sizes = [item_size(item_bytes[b.segment]) * (b.stop - b.start) for b in crossing.lane.buckets]
            saved = max(0, 2 * (hosts - 1) * sum(sizes) // hosts - sent)
            norm = math.sqrt(sum(crossing.reduce.error_squares.values()))
        elif crossing.packed is not None:
            saved = crossing.packed.take_saved_bytes()
        return WireUse(sent, crossing.lane.exchanging_s, exposed_s, saved, norm)

    def _give_up_together(self, step: int) -> None:
        """Give up this generation, and wait until all of this host have, or the step is summed all the same.

        Whether it is must be seen alike by all of them; so nobody sums any more when they look.
        """
        self._give_up()
        local, number = self.local, self.local.generation

        def ended() -> bool | None:
            left = all(local.header.left(slot) >= number or local.roll.is_lost(slot) for slot in local.members)
            return True if left or self.crossing.is_complete else None

        local.patient(ended, f"end of the exchange of step {step}", local.doing)

    def _give_up(self) -> None:
        """Sum nothing more in this generation."""
        if self._crossing is not None:
            self._crossing.close()
        self.local.header.leave(self.local.slot, self.local.generation)

    def _regroup(self, error: GroupError) -> Regrouped:
        """Go on with the hosts that are decided on: what follows.

        Raises:
            GroupError: where nothing is decided in time.
            RunOver: where the others, whom this host was to join, have ended.
        """
        while True:
            self._give_up()
            self._refuse_to_go_round(error)
            self._slots = slots = self._await_decision(error)
            before = [] if self._crossing is None else list(self.place.hosts.numbers)
            try:
                self.place = self._all.among(slots)
                self._crossing = self._cross()
                return self._compare(before)
            except Regrouped:
                raise
            except GroupError as again:
                error = again
            except LaunchError as again:
                error = GroupError(str(again))

    def _refuse_to_go_round(self, error: GroupError) -> None:
        """The same hosts that fail again and again at the same step will not do better."""
        where = (self.place.hosts, self.local.header.committed)
        self._tries = self._tries + 1 if where == self._failed_at else 1
        self._failed_at = where
        if self._tries > MOST_TRIES:
            raise GroupError(f"{error}; the same hosts have failed at this step {MOST_TRIES} times") from error

    def _await_decision(self, error: GroupError) -> Mapping[int, Sequence[int]]:
        """The workers of each host in the next generation, this one among them."""
        local, began, idle = self.local, time.monotonic(), False
        header, host = local.header, self._all.host
        while True:
            number, slots = header.hosts()
            if number > local.generation and local.slot in slots.get(host, ()):
                local.advance(number, slots[host])
                return slots
            if self._joins and header.course is Course.OVER:
                raise RunOver("training was over before this host could join")
            waited = time.monotonic() - began
            elsewhere = number > local.generation or self._crossing is None  # others train, and will let it in
            if local.is_revoked() or (waited > local.deadline_s + GRACE_S and not (header.undecided or elsewhere)):
                raise error
            if (waited > IDLE_S or header.undecided or elsewhere) and not idle and self.continuity is not None:
                idle = True
                self.continuity.idle()
            header.beat(local.slot)
            time.sleep(POLL_S)

    def _compare(self, before: Sequence[int]) -> Regrouped:
        """How far each host is; those that are behind get the state."""
        local, continuity, now = self.local, self.continuity, self.place.hosts.numbers
        assert continuity is not None
        at = self._committed()
        kept = self.local.kept(at + 1) if self.local.rank == 0 else {}
        mine = {"step": at, "known": self._known.decode(), "kept": _coded(kept), **continuity.say()}
        said = [json.loads(data) for data in self._gather(json.dumps(mine).encode(), "comparison of hosts")]
        first = max(range(len(said)), key=lambda rank: (*_how_far(said[rank]), -rank))
        known, step = said[first], said[first]["step"]
        if step < 0:
            raise GroupError("none of the hosts that go on has the state")
        self._known = known["known"].encode()
        self._flags = 0  # of which one that comes knows nothing
        steps = [max(w["step"] for w in said[self.place.hosts.rank(h, 0) :][:n]) for h, n in enumerate(self._sizes)]
        source, behind = self.place.hosts.place(first)[0], [h for h, at in enumerate(steps) if at < step]
        if local.rank == 0 and (self.place.host == source or self.place.host in behind):
            self._transfer(source, behind, step)
        if self.place.host in behind:
            for block in range(len(continuity.versions)) if local.rank == 0 else ():
                continuity.versions[block] = step
            local.header.committed = step if local.rank == 0 else local.header.committed
            local.barrier(f"state of step {step}")
        self._go_on(step + 1, [_decoded(said[r]) if said[r]["step"] == step else {} for r in self._firsts])
        local.finish(step)
        self.enter("wait", step + 1)
        local.header.set_ready(local.slot, False)
        chiefs = [rank for rank, worker in enumerate(said) if worker["chief"]]
        self._chief = first if not chiefs or known["chief"] else chiefs[0]
        lost, joined = sorted(set(before) - set(now)), sorted(set(now) - set(before)) if before else []
        rest = self._rest(step + 1)
        taken_over = None if rest is None else rest.taken_over
        self._news.append(HostsChanged(step + 1, local.generation, now, self._sizes, joined, lost, taken_over))
        return Regrouped(step, known)

    @property
    def _firsts(self) -> list[int]:
        """The rank of the first worker of each host."""
        hosts = self.place.hosts
        return [hosts.rank(host, 0) for host in range(len(hosts.sizes))]

    def _go_on(self, step: int, kept: Sequence[Mapping[int, Sequence[Node]]]) -> None:
        """What all have published of the step that was under way counts; what is missing is divided among them."""
        local, rest = self.local, None
        if self._terms.way.algorithm == "canonical":
            slots = [self._slots[number] for number in self.place.hosts.numbers]
            rest = continuation(kept, slots, self._terms.count, local.layout.entries)
        if rest is not None and local.rank == 0:
            local.keep(step, kept[self.place.host])
        self._continued = step, rest

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.place.hosts.sizes

    def _committed(self) -> int:
        """The last step whose state is whole on this host; one that has just begun has none."""
        header = self.local.header
        return -1 if header.course is Course.STARTING and self._joins else header.committed

    def _transfer(self, source: int, behind: Sequence[int], step: int) -> None:
        """The state, and its checksum, from one host to those that are behind."""
        assert self.continuity is not None
        if not behind:
            return
        parts, operation = [part.view(-1) for part in self.continuity.parts()], f"state of step {step}"
        own = _checksum(parts) if self.place.host == source else bytes(32)
        checksum = as_tensor(own).clone()
        self.leaders.transfer([*parts, checksum], source, behind, operation)
        if self.place.host != source and checksum.numpy().tobytes() != _checksum(parts):
            raise GroupError(f"{operation} did not arrive as host {self.place.hosts.numbers[source]} has it")

    def enter_run(self) -> Regrouped:
        """Join hosts that train already; the step after which, and what is known of it."""
        self.local.header.set_ready(self.local.slot, True)
        return self._regroup(GroupError("nobody has let this host in"))

    def distribute(self, step: int, values: View) -> None:
        """Where hosts share one state: what each has updated, to all; nothing is to be done where each has all of it.

        Arguments:
            values: (segment, start, stop) -> the parameters that lie there.
        """
        if self._terms.shards is None or self._terms.shards.values:
            return
        operation = f"values of step {step}"
        if self.local.size > 1:
            self.local.barrier(operation)
        crossing, wire, shards = self.crossing, self.crossing.data, self._terms.shards
        if wire is None:
            return

        def work() -> bool:
            moving = []
            for bucket in crossing.lane.buckets:
                parts = [
                    [values(bucket.segment, bucket.start + p.start, bucket.start + p.stop) for p in own]
                    for own in shards.updated(bucket)
                ]
                others = [h for h in range(wire.size) if h != wire.rank]
                sends = [(part, h) for h in others for part in parts[wire.rank]]
                receives = [(part, h) for h in others for part in parts[h]]
                moving.append(wire.post(sends, receives, bucket.index * TAGS_A_BUCKET + 3))
            for pending in moving:
                pending.wait(operation)
            return True

        crossing.call(work, operation)

    def values(self, groups: Sequence[Sequence[Piece]], view: View, release: Callable[[int, int, int], None]) -> Values:
        """What brings together parameters of which every host keeps a part; all hosts make it at the same time.

        Arguments:
            groups: what is brought together.
            view: (segment, start, stop) -> the memory of values.
            release: gives that memory back.
        """
        wire = self.crossing.new_wire("values")
        return Values(wire, groups, view, release)

    def finish(self, step: int) -> None:
        """This worker is done with the step."""
        self.local.finish(step)

    def note_step(self, flags: int, seconds: Mapping[int, Sequence[float]], use: WireUse) -> None:
        """Where hosts sum no gradients, what workers have told each other at the end of a step.

        Arguments:
            seconds: in each phase, by rank.
        """
        self._flags, self._use = flags, use
        self.crossing.remote.update({rank: list(lap) for rank, lap in seconds.items()})

    def settle(self, step: int) -> Sequence[Loss]:
        """Wait for the workers of this host: its state is whole; where hosts share it, a mate may wait for one."""
        if self._terms.survives:
            return self.local.settle(step)
        with self.crossing.patience.telling():
            return self.local.settle(step, GRACE_S if self._terms.shards is not None else 0.0)

    def set_flags(self, flags: int) -> None:
        """Requests to go with the next step."""
        packed = self._trial is not None and self._trial.wanted
        self.local.set_flags(flags | PACKED if packed else flags)

    def all_flags(self) -> int:
        """Everyone's requests joined."""
        return self._flags

    def all_gather(self, payload: bytes, operation: str) -> list[bytes]:
        """Everyone's payload: inside the hosts, between them, and inside again.

        Raises:
            Regrouped: where hosts are lost or have come, and it is to be asked again.
        """
        try:
            return self._gather(payload, operation)
        except GroupError as error:
            if not self._terms.survives or self.continuity is None:
                raise
            raise self._regroup(error) from error

    def _gather(self, payload: bytes, operation: str) -> list[bytes]:
        if self.crossing.closed:
            raise GroupError("other hosts than before go on")
        own = self._gather_here(payload, operation)
        joined = join(self.leaders.gather(join(own), operation)) if self.local.rank == 0 else b""
        return self._hand_round(joined, operation)

    def start_gather(self, payload: bytes, operation: str) -> Callable[[], list[bytes]]:
        """As `all_gather`, while training goes on: what it returns is called, by all workers, for everyone's payload.

        Only for groups whose replicas train apart.
        """
        own, bulk = self._gather_here(payload, operation), self.crossing.bulk
        running = bulk.start(join(own), operation) if bulk is not None else None

        def end() -> list[bytes]:
            while self.local.all_gather(self._moves(running, operation), operation, GRACE_S)[0]:
                pass  # as long as something arrives it may take its time
            return self._hand_round(join(running.result()) if running is not None else b"", operation)

        return end

    def _moves(self, running: "Future[list[bytes]] | None", operation: str) -> bytes:
        """Wait until a large exchange is over; not empty where it goes on, and something has arrived meanwhile."""
        bulk = self.crossing.bulk
        if running is None or bulk is None:
            return b""
        seen, began = bulk.moved, time.monotonic()

        def over_or_moving() -> bytes | None:
            if running.done():
                return b""
            return b"more" if bulk.moved > seen and time.monotonic() - began > SOME_S else None

        return self.crossing.patience.wait(over_or_moving, running, operation)

    def _gather_here(self, payload: bytes, operation: str) -> list[bytes]:
        """The payloads of this host's workers."""
        with self.crossing.patience.telling():
            own = self.local.all_gather(payload, operation)
        self._refuse_losses(operation)
        return own

    def _hand_round(self, joined: bytes, operation: str) -> list[bytes]:
        """Everyone's payloads, from this host's first worker, who has them."""
        with self.crossing.patience.telling():
            everything = self.local.all_gather(joined, operation, GRACE_S)[0]
        if not everything:
            self._refuse_losses(operation)
        return [part for host in split(everything) for part in split(host)]

    def _refuse_losses(self, operation: str) -> None:
        """What a lost worker would have said, others must not do without: it is asked again in the next generation."""
        lost = [slot for slot in self.local.members if self.local.roll.is_lost(slot)]
        if lost:
            raise GroupError(f"{operation}: {self.local.names(lost[0])} is lost")

    def barrier(self, operation: str) -> None:
        """An exchange of nothing."""
        self.all_gather(b"", operation)

    def news(self) -> list[Event]:
        """Hosts that were lost, or have come."""
        news, self._news = self._news, []
        return news

    def report(self, step: int, seconds: Sequence[float]) -> None:
        """Leave this worker's seconds in each phase."""
        self.local.report(step, seconds)

    def reports(self, step: int) -> list[list[float]]:
        """Seconds in each phase, a list for each rank; those of other hosts are of the step before."""
        first = self.place.hosts.rank(self.place.host, 0)
        own = dict(enumerate(self.local.reports(step), first))
        return [own.get(rank) or self.crossing.remote.get(rank, [0.0] * len(PHASES)) for rank in range(self.size)]

    def work(self) -> Mapping[int, int]:
        """Shares do not follow speed between hosts."""
        return {}

    def broadcast(self, tensor: Tensor, operation: str) -> None:
        """On the first worker of every host: the first host's values, for all."""
        self.leaders.broadcast(tensor, operation)

    def gather_compression(self) -> dict[str, Tensor]:
        """On the first worker of every host: the errors of all hosts, added up; kept by the first."""
        if self._wire_state is None:
            return {}
        result = gathered(self._wire_state, self._terms.flat, self.leaders.add_up)
        return result if self.rank == 0 else {}

    def restore_compression(self, tensors: Mapping[str, Tensor]) -> None:
        """On the first worker of every host: take an equal part of the errors that were added up."""
        terms = self._terms
        if self._wire_state is None or terms.way.compression is None:
            return
        hosts = len(self.place.hosts.sizes)
        restore(self._wire_state, terms.flat, terms.way.compression, tensors, hosts, self.leaders.broadcast)

    def leave_known(self, data: bytes) -> None:
        """Leave what a host that joins, or is behind, must know besides the state; all leave the same."""
        self._known = data

    def known(self) -> bytes:
        """What the host that was farthest has left, the last time that hosts were compared."""
        return self._known

    def conclude(self) -> None:
        """The first worker stays the chief: who is lost here ends this group."""

    def begin_work(self) -> None:
        """From here on the others go on where a worker is lost."""
        self.local.begin_work()

    def end(self) -> None:
        """Training is over."""
        self.local.end()

    @property
    def asked_to_leave(self) -> bool:
        """Nobody leaves alone."""
        return False

    @property
    def leaves(self) -> bool:
        """Nobody leaves alone."""
        return False

    @property
    def deadline_s(self) -> float:
        """Seconds that any wait may take."""
        return self.local.deadline_s

    def revoke(self, cause: str = "") -> None:
        """End this generation on this host, and free whoever waits on its wires."""
        self.crossing.revoke(cause)

    def close(self, cause: BaseException | None = None) -> None:
        """Let go of the wires and their thread; others that still wait on them fail, and are told the cause."""
        crossing = self._crossing
        if crossing is None:
            return
        if cause is not None:
            crossing.tell(cause)
        unfinished = crossing.running is not None and not crossing.running.done()
        if not self._terms.survives and (cause is not None or unfinished):
            self.local.revoke(str(cause) if cause is not None else "this worker left in the middle of a step")
        crossing.close()

    def reform(self, generation: int, members: Sequence[int]) -> "HierarchicalGroup":
        """The next generation: ``members`` are world ranks of this one, in order.

        Raises:
            GroupError: where hosts share one state, of which those that are gone had a part, or where a replica's
                workers are gone of whom others are left.
        """
        left = Counter((host, local // self._replica) for host, local in map(self.place.hosts.place, members))
        if set(left.values()) - {self._replica}:
            raise GroupError("workers of a replica are gone, and its others cannot go on alone; resume with whole ones")
        shards = self._terms.shards
        if shards is not None and len({self.place.hosts.place(rank)[0] for rank in members}) < shards.hosts:
            raise GroupError("a host is gone that kept a part of the state; resume from the last checkpoint")
        self.close()
        places = [self.place.hosts.place(rank) for rank in members]
        hosts = sorted({host for host, _ in places})
        sizes = tuple(sum(1 for host, _ in places if host == h) for h in hosts)
        slots = [self.local.members[local_rank] for host, local_rank in places if host == self.place.host]
        local = self.local.reform(generation, slots)
        return HierarchicalGroup(local, Place(Hosts(sizes), members.index(self.rank)), self._terms)


def _how_far(said: Mapping[str, Any]) -> tuple[int, bool, int, bool, bool, bool]:
    """How much one worker knows of the run: whoever is farthest tells the others."""
    ends, known = bool(said["ends"]), said["known"] != "{}"
    return said["step"], said["outcome"] is not None, said["evaluated"], ends, known, said["chief"]


def _coded(kept: Mapping[int, Sequence[Node]]) -> dict[str, list[int]]:
    """Subtrees of slots, for a message."""
    return {str(slot): [node.code for node in nodes] for slot, nodes in kept.items()}


def _decoded(said: Mapping[str, Any]) -> dict[int, list[Node]]:
    return {int(slot): [Node.from_code(code) for code in codes] for slot, codes in said["kept"].items()}


def _checksum(parts: Sequence[Tensor]) -> bytes:
    """Of flat tensors on the CPU."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.view(torch.uint8).numpy().data)
    return found.digest()
