"""The workers of several hosts as a group: the arena inside a host, a network between hosts, exact.

Every host holds the whole training state, or hosts share one (`plan.shards`); its workers own and update what it keeps.
What crosses the network is the step's gradient: each local rank, in its lane, sums its buckets with its like on the
other hosts, while the backward still runs. With one worker on every host this is a plain network group: one code path
for both.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from unisono.comm.blame import Bulletin
from unisono.comm.canonical import Cover
from unisono.comm.exchange import (
    TAGS_A_BUCKET,
    Canonical,
    ExchangePlan,
    HostSums,
    Lane,
    Parts,
    Reduction,
    Words,
    equal_parts,
)
from unisono.comm.group import PACKED
from unisono.comm.heads import Heads, join, split
from unisono.comm.host import HostGroup
from unisono.comm.leaders import Leaders
from unisono.comm.network import Link, NetworkWire
from unisono.comm.packing import Packed, Trial
from unisono.comm.partial import Partial, item_size
from unisono.comm.patience import GRACE_S, Patience
from unisono.comm.readiness import Readiness
from unisono.comm.reductions import Algorithm, Compressed, Ends
from unisono.comm.rounds import RoundSums
from unisono.comm.values import Values
from unisono.comm.way import Way
from unisono.comm.wire_state import WireState, gathered, restore, wire_regions, wire_state
from unisono.comm.words import store_fence
from unisono.errors import GroupError
from unisono.events import PHASES, Event, WireUse
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.plan.exchange import Bucket, host_shares, round_shares
from unisono.plan.hosts import Hosts, Place
from unisono.plan.roster import Loss
from unisono.plan.shards import Piece, StateShards
from unisono.run.summation import Node, accumulation, root

T = TypeVar("T")
View = Callable[[int, int, int], Tensor]
"""(segment, start, stop) -> the parameters that lie there."""


class HierarchicalGroup:
    """A `Group` over several hosts.

    Arguments:
        local: the workers of this host.
        place: this worker among all.
        link: how hosts reach each other.
        flat: where gradients lie.
        way: how they travel.
        count: micro-batches in a step.
        teams: who computes which part of the model; each host's workers are whole replicas.
        name: of the run's set of workers; generations add their number.
        shards: which host keeps what, where they share one state; None where every host has all of it.
    """

    def __init__(
        self,
        local: HostGroup,
        place: Place,
        link: Link,
        flat: FlatLayout,
        way: Way,
        count: int,
        teams: Teams,
        name: str = "group",
        shards: StateShards | None = None,
    ) -> None:
        self.unlike = ""
        self.local = local
        self.local.names = place.local_name
        self.place = place
        self._link = link
        self._flat = flat
        self._way = way
        team_of = {slot: t for t, crews in enumerate(local.teams) for crew in crews for slot in crew}
        self._team = team_of[local.slot]
        self._buckets = way.buckets(flat, teams, [team_of[slot] for slot in local.members[: place.hosts.lanes]])
        self._count = count
        self._teams = teams
        self._name = name
        self._rounds = shards.rounds if shards is not None else 0
        self._replica = local.size // len(local.teams[0])  # workers of one
        replicas = [size // self._replica for size in place.hosts.sizes]
        shares = round_shares(len(replicas), count) if self._rounds else host_shares(replicas, count)
        self._plan = ExchangePlan(self._buckets, shares, count)
        self._words = Words(local)
        self._shards = shards
        self._total = local.total()
        if shards is not None and local.size == 1:  # what is summed here takes the place of what was sent
            first = self._rounds + 1 if self._rounds else self._plan.shares[place.host].parts[0].entry
            self._total = self._total.over(local.view(local.slot, first))
        self._heads = Heads(local, place, self._plan, teams, self._total)
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._use = WireUse(0, 0.0, 0.0)
        self._remote: dict[int, list[float]] = {}
        self._step, self._began, self._flags = 0, 0.0, 0
        self._exchanged = 0  # the turn that this worker's lane exchanges
        self._packed: Packed | None = None
        self._trial = Trial() if way.lossless == "auto" and place.rank == 0 else None
        generation = f"{name}/generation {local.generation}"
        self._bulletin = Bulletin(link.store, place.hosts, place.rank, generation)
        self._patience = Patience(local, place, self._bulletin, self._late, self.revoke)
        self._readiness = Readiness(
            self._words,
            local.slot,
            [bucket for bucket in self._buckets if bucket.team == self._team],
            self._rounds,
            lambda ready, operation: self._patience.wait(ready, self._running, operation),
        )
        self._wire_state: WireState | None = None
        if way.compression is not None:
            regions = wire_regions(flat, way.compression)
            self._wire_state = wire_state(flat, way.compression, regions, local.memory("wire"))
        self._wires: list[NetworkWire] = []
        self._leaders: Leaders | None = None
        self._data: NetworkWire | None = None
        if place.local_rank < place.hosts.lanes:
            self._connect()

    def _connect(self) -> None:
        """Join this worker's lane."""
        lane = self.place.local_rank
        on_cpu = replace(self._link, backend="gloo", device=torch.device("cpu"))
        self._data = self._new_wire(self._link, "data")
        control = self._data if self._link == on_cpu else self._new_wire(on_cpu, "control")
        if self._way.may_pack and not self._data.ordered:
            self._packed = Packed(self._data)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unisono-exchange", initializer=_one_thread)
        self._leaders = Leaders(control, self._call, self._tag(1))
        self._reduce = self._reduction(self._data, control)
        self._lane = Lane(
            buckets=[bucket for bucket in self._buckets if bucket.lane == lane],
            ready=self._is_ready,
            await_ready=self._await_ready,
            reduce=self._reduce,
            done=self._is_summed,
            ordered=self._data.ordered,
            last=(lambda step: self._sum_heads(step, control)) if lane == 0 else None,
            finished=self._heads_are_summed,
        )

    def _new_wire(self, link: Link, kind: str) -> NetworkWire:
        """One more wire of this worker's lane."""
        lane, hosts = self.place.local_rank, self.place.hosts

        def explain(peer: int, operation: str, deadline: str) -> GroupError:
            return self._bulletin.explain(hosts.rank(peer, lane), operation, deadline)

        name = f"{self._name}/generation {self.local.generation}/lane {lane}/{kind}"
        wire = NetworkWire(link, name, self.place.host, len(hosts.sizes), explain)
        self._wires.append(wire)
        return wire

    def _reduction(self, data: NetworkWire, control: NetworkWire) -> Canonical | RoundSums | Algorithm | Compressed:
        """How this lane sums a bucket."""
        way, flat = self._way, self._flat
        share = self._plan.shares[self.place.host]
        sums = HostSums(self.local, flat, share, self._total, self._count)
        carrier = self._packed or data
        ends = Ends(carrier, carrier if control is data else control, flat, sums, self._total)
        if way.compression is not None:
            assert self._wire_state is not None
            return Compressed(ends, way.compression, self._wire_state)
        if self._shards is not None and self._rounds:
            leaves, most = accumulation(0, self._count, self._count)
            pending = [self.local.view(self.local.slot, self._rounds + 1 + number) for number in range(most)]
            return RoundSums(
                carrier, control, self._shards, leaves, self._leaf, pending, self._total, self._release_gradient
            )
        if way.algorithm == "canonical":  # which it is wherever hosts share one state
            shards = self._shards
            parts: Parts = shards.gradients if shards is not None else equal_parts(data.size)
            return Canonical(carrier, control, self._plan, flat, sums, self._total, parts, back=shards is None)
        return Algorithm(ends, lambda size_bytes: way.choose(data, size_bytes))

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
        return self._readiness.gradient_is_final

    @property
    def leaders(self) -> Leaders:
        """On the first worker of every host: what says something to the others between steps."""
        assert self._leaders is not None
        return self._leaders

    @property
    def wire_use(self) -> WireUse:
        """What the last step's exchange took."""
        return self._use

    @property
    def chief(self) -> bool:
        """Whether this worker keeps the run's records."""
        return self.rank == 0

    def enter(self, activity: str, step: int, micro_batch: int | None = None) -> None:
        """Say what this worker does now."""
        self.local.enter(activity, step, micro_batch)

    def begin(self, step: int, count: int) -> None:
        """Let the exchange of a step begin as its buckets come."""
        self._step, self._began = step, time.perf_counter()
        if self._packed is not None:
            self._packed.on = self._way.lossless == "always" or bool(self._flags & PACKED)
        self._readiness.begin(step)
        if self._thread is not None:
            self._running = self._thread.submit(self._exchange, step)

    def partial(self, entry: int) -> Partial:
        """This worker's buffer number ``entry``; in rounds all share the memory of one gradient, one after another."""
        if self._rounds == 0:
            return self.local.partial(entry)
        if entry > 0:
            self._readiness.await_summed(len(self._buckets), entry - 1)
        return self._leaf(entry)

    def _leaf(self, number: int) -> Partial:
        """This worker's micro-batch of a round."""
        return self.local.partial(number).over(self.local.view(self.local.slot, self._rounds))

    def _release_gradient(self, segment: int, start: int, stop: int) -> None:
        """Elements of this worker's gradient have been summed."""
        fields, size = self.local.partials.fields.named, item_size(self._flat.segment_dtypes[segment])
        field = fields[f"segment {segment}"]
        whole = self.local.layout.partial(self.local.slot, self._rounds)
        self.local.arena.release(whole.part(field.offset + start * size, (stop - start) * size))

    def publish(self, step: int, entry: int, node: Node, *, whole: bool = False) -> None:
        """The subtree is complete; with this worker's last one, so are all its buckets."""
        self.local.publish(step, entry, node, whole=whole)
        crews = self.local.teams[self._team]
        replica = next(number for number, crew in enumerate(crews) if self.local.slot in crew)
        mine = [part for part in self._plan.shares[self.place.host].parts if part.replica == replica]
        if self._rounds or node == mine[-1].node:
            self._readiness.end()

    def published(self, step: int) -> int:
        """How many subtrees of a step this worker has published."""
        return self.local.published(step)

    def collect(self, step: int, count: int, rescue: Callable[[Sequence[int]], None]) -> list[Cover]:
        """Wait until the exchange is over: one subtree, the whole, in this host's total.

        The exchange's own deadline begins when this host has computed everything: stages end one after another.
        """
        if not self._rounds:
            with self._patience.telling():
                self.local.await_published(step, [part.node for part in self._plan.shares[self.place.host].parts])
        arrived = time.perf_counter()
        last = self._readiness.last_turn

        def ready() -> bool | None:
            return True if self._words.all_summed(last) else None

        self._patience.wait(ready, self._running, f"exchange of step {step}")
        if self._data is not None:
            sent = sum(wire.take_sent_bytes() for wire in self._wires)
            self._use = self._measured(sent, time.perf_counter() - arrived)
        if self._trial is not None and self._packed is not None:
            self._trial.note(self._packed.on, time.perf_counter() - self._began)
        self._flags = self._words.flags
        self.local.header.closed = step
        return [[(root(count), self._total)]]

    def _measured(self, sent: int, exposed_s: float) -> WireUse:
        saved, norm = 0, None
        if isinstance(self._reduce, Compressed):
            hosts = len(self.place.hosts.sizes)
            sizes = [item_size(self._flat.segment_dtypes[b.segment]) * (b.stop - b.start) for b in self._lane.buckets]
            saved = max(0, 2 * (hosts - 1) * sum(sizes) // hosts - sent)
            norm = math.sqrt(sum(self._reduce.error_squares.values()))
        elif self._packed is not None:
            saved = self._packed.take_saved_bytes()
        return WireUse(sent, self._lane.exchanging_s, exposed_s, saved, norm)

    def distribute(self, step: int, values: View) -> None:
        """Where hosts share one state: what each has updated, to all; nothing is to be done where each has all of it.

        Arguments:
            values: (segment, start, stop) -> the parameters that lie there.
        """
        if self._shards is None or self._shards.values:
            return
        operation = f"values of step {step}"
        if self.local.size > 1:
            self.local.barrier(operation)
        if self._data is None:
            return
        wire, shards = self._data, self._shards

        def work() -> bool:
            moving = []
            for bucket in self._lane.buckets:
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

        self._call(work, operation)

    def values(self, groups: Sequence[Sequence[Piece]], view: View, release: Callable[[int, int, int], None]) -> Values:
        """What brings together parameters of which every host keeps a part; all hosts make it at the same time.

        Arguments:
            groups: what is brought together.
            view: (segment, start, stop) -> the memory of values.
            release: gives that memory back.
        """
        wire = self._new_wire(self._link, "values")
        return Values(wire, groups, view, release)

    def _late(self) -> set[int]:
        """Local ranks that have not finished their part of an exchange."""
        turn = self._readiness.last_turn
        late = {b.lane for b in self._buckets if not self._words.summed(b.index, turn)}
        if not late and not self._words.summed(len(self._buckets), turn):
            late = {0}
        return late

    def _call(self, work: Callable[[], T], operation: str) -> T:
        """Do something with the wire: on its thread, so that this one can be freed."""
        assert self._thread is not None
        running = self._thread.submit(work)
        return self._patience.wait(lambda: running.result() if running.done() else None, running, operation)

    def _exchange(self, step: int) -> None:
        """On the exchange thread: a lane's buckets and, in the first lane, all that is no gradient."""
        rounds = max(1, self._rounds)
        self._lane.exchanging_s = 0.0
        with self._patience.telling():
            for number in range(rounds):
                self._exchanged = self._readiness.turn(number)
                self._lane.run(step, self._exchanged, last=number == rounds - 1)

    def _is_ready(self, bucket: Bucket) -> bool:
        crews = self.local.teams[bucket.team]
        return all(self._words.ready(slot, bucket.index, self._exchanged) for crew in crews for slot in crew)

    def _await_ready(self, bucket: Bucket) -> None:
        """Wait for this worker's gradients of a bucket, and from then on, with a deadline, for its mates'."""
        step, turn = self._step, self._exchanged
        team = {slot for crew in self.local.teams[bucket.team] for slot in crew}

        def arrived(slot: int) -> bool:
            return slot not in team or self._words.ready(slot, bucket.index, turn)

        self._await_own(lambda: arrived(self.local.slot), f"bucket {bucket.index} of step {step}")
        self.local.waiter(
            lambda: True if self._is_ready(bucket) else None,
            f"bucket {bucket.index} of step {step}",
            lambda: self.local.missing(arrived),
        )

    def _await_own(self, ready: Callable[[], bool], operation: str) -> None:
        """This worker's own backward may take its time."""

        def doze(seconds: float) -> None:
            if self._readiness.stirred.wait(seconds):
                self._readiness.stirred.clear()

        own = replace(self.local.waiter, deadline_s=float("inf"), sleep=doze)
        own(lambda: True if ready() else None, operation, str)

    def _sum_heads(self, step: int, wire: NetworkWire) -> Reduction:
        """All that is no gradient; this lane may have had no bucket to wait for."""
        self._await_own(lambda: self._readiness.over >= step, f"end of step {step}")
        return self._heads(step, wire, self._tag(0))

    def _is_summed(self, bucket: Bucket) -> None:
        store_fence()
        self._words.set_summed(bucket.index, self._exchanged)

    def _heads_are_summed(self) -> None:
        self._remote.update(self._heads.reports)
        self._words.flags = self._heads.flags
        store_fence()
        self._words.set_summed(len(self._buckets), self._exchanged)

    def _tag(self, number: int) -> int:
        """Tags of what is no bucket."""
        return (len(self._buckets) + number) * TAGS_A_BUCKET

    def finish(self, step: int) -> None:
        """This worker is done with the step."""
        self.local.finish(step)

    def settle(self, step: int) -> Sequence[Loss]:
        """Wait for the workers of this host: its state is whole; where hosts share it, a mate may wait for one."""
        with self._patience.telling():
            return self.local.settle(step, GRACE_S if self._shards is not None else 0.0)

    def set_flags(self, flags: int) -> None:
        """Requests to go with the next step."""
        packed = self._trial is not None and self._trial.wanted
        self.local.set_flags(flags | PACKED if packed else flags)

    def all_flags(self) -> int:
        """Everyone's requests joined."""
        return self._words.flags

    def all_gather(self, payload: bytes, operation: str) -> list[bytes]:
        """Everyone's payload: inside the hosts, between them, and inside again."""
        with self._patience.telling():
            own = self.local.all_gather(payload, operation)
        joined = b""
        if self.local.rank == 0:
            joined = join(self.leaders.gather(join(own), operation))
        with self._patience.telling():
            hosts = split(self.local.all_gather(joined, operation, GRACE_S)[0])
        return [part for host in hosts for part in split(host)]

    def barrier(self, operation: str) -> None:
        """An exchange of nothing."""
        self.all_gather(b"", operation)

    def news(self) -> list[Event]:
        """Who is lost here ends this group."""
        return []

    def report(self, step: int, seconds: Sequence[float]) -> None:
        """Leave this worker's seconds in each phase."""
        self.local.report(step, seconds)

    def reports(self, step: int) -> list[list[float]]:
        """Seconds in each phase, a list for each rank; those of other hosts are of the step before."""
        first = self.place.hosts.rank(self.place.host, 0)
        own = dict(enumerate(self.local.reports(step), first))
        return [own.get(rank) or self._remote.get(rank, [0.0] * len(PHASES)) for rank in range(self.size)]

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
        result = gathered(self._wire_state, self._flat, self.leaders.add_up)
        return result if self.rank == 0 else {}

    def restore_compression(self, tensors: Mapping[str, Tensor]) -> None:
        """On the first worker of every host: take an equal part of the errors that were added up."""
        if self._wire_state is None or self._way.compression is None:
            return
        hosts = len(self.place.hosts.sizes)
        restore(self._wire_state, self._flat, self._way.compression, tensors, hosts, self.leaders.broadcast)

    def leave_known(self, data: bytes) -> None:
        """Nobody joins."""

    def known(self) -> bytes:
        """Nobody joins."""
        return b""

    def conclude(self) -> None:
        """The first worker stays the chief: who is lost here ends this group."""

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
        self.local.revoke(cause)
        for wire in self._wires:
            wire.revoke()

    def close(self, cause: BaseException | None = None) -> None:
        """Let go of the wires and their thread; others that still wait on them fail, and are told the cause."""
        if cause is not None:
            self._patience.tell(cause)
        if cause is not None or (self._running is not None and not self._running.done()):
            self.local.revoke(str(cause) if cause is not None else "this worker left in the middle of a step")
        for wire in self._wires:
            wire.revoke()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        for wire in self._wires:
            wire.close()

    def reform(self, generation: int, members: Sequence[int]) -> "HierarchicalGroup":
        """The next generation: ``members`` are world ranks of this one, in order.

        Raises:
            GroupError: where hosts share one state, of which those that are gone had a part, or where a replica's
                workers are gone of whom others are left.
        """
        left = Counter((host, local // self._replica) for host, local in map(self.place.hosts.place, members))
        if set(left.values()) - {self._replica}:
            raise GroupError("workers of a replica are gone, and its others cannot go on alone; resume with whole ones")
        if self._shards is not None and len({self.place.hosts.place(rank)[0] for rank in members}) < self._shards.hosts:
            raise GroupError("a host is gone that kept a part of the state; resume from the last checkpoint")
        self.close()
        places = [self.place.hosts.place(rank) for rank in members]
        hosts = sorted({host for host, _ in places})
        sizes = tuple(sum(1 for host, _ in places if host == h) for h in hosts)
        slots = [self.local.members[local_rank] for host, local_rank in places if host == self.place.host]
        local = self.local.reform(generation, slots)
        place = Place(Hosts(sizes), members.index(self.rank))
        return HierarchicalGroup(
            local, place, self._link, self._flat, self._way, self._count, self._teams, self._name, self._shards
        )


def _one_thread() -> None:
    torch.set_num_threads(1)
