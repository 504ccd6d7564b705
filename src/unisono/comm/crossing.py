"""One worker's part in the exchange between hosts, as long as the same hosts train: its wires, and who sums what.

Each local rank has a lane: it exchanges buckets with its like on the other hosts, on a thread of its own. The first
lane sums besides what is no gradient.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from unisono.comm.background import Background
from unisono.comm.blame import Bulletin
from unisono.comm.bulk import Bulk
from unisono.comm.exchange import (
    TAGS_A_BUCKET,
    Canonical,
    Crews,
    ExchangePlan,
    HostSums,
    Lane,
    Parts,
    Reduction,
    Words,
    equal_parts,
)
from unisono.comm.foretold import Foretold
from unisono.comm.heads import Heads
from unisono.comm.host import HostGroup
from unisono.comm.leaders import Leaders
from unisono.comm.network import Explain, Link, NetworkWire
from unisono.comm.packing import Packed
from unisono.comm.partial import Partial, item_size
from unisono.comm.patience import Patience
from unisono.comm.readiness import Readiness
from unisono.comm.reductions import Algorithm, Compressed, Ends
from unisono.comm.rounds import RoundSums
from unisono.comm.way import Way
from unisono.comm.wire_state import WireState
from unisono.comm.words import store_fence
from unisono.errors import GroupError, PeerLost, WaitTimeout
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.plan.continuation import Continuation
from unisono.plan.exchange import Bucket, HostShare, host_shares, round_shares
from unisono.plan.hosts import Place
from unisono.plan.shards import StateShards, apart_shares
from unisono.run.summation import Node, accumulation

T = TypeVar("T")

DOZE_S = 0.05
"""How often the exchange thread looks around while nothing is to be done: each time takes the interpreter away from the
backward."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How replicas train apart.

    Attributes:
        replicas: how many there are.
        steps: whether a step is one of those.
    """

    replicas: int
    steps: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is exchanged, whoever takes part.

    Attributes:
        link: how hosts reach each other.
        flat: where gradients lie.
        way: how they travel.
        count: micro-batches in a step.
        teams: who computes which part of the model; each host's workers are whole replicas.
        name: of the run's set of workers; generations add their number.
        shards: which host keeps what, where they share one state; None where every host has all of it.
        survives: other hosts go on where one is lost.
        apart: replicas train apart, each on one host, in some steps; None where they do not.
    """

    link: Link
    flat: FlatLayout
    way: Way
    count: int
    teams: Teams
    name: str = "group"
    shards: StateShards | None = None
    survives: bool = False
    apart: Apart | None = None

    def is_apart(self, step: int) -> bool:
        """Whether each host keeps the gradients of a step to itself."""
        return self.apart is not None and self.apart.steps(step)


class Crossing:
    """One worker's, in one generation.

    Arguments:
        local: the workers of this host.
        place: this worker among all.
        total: receives the sums.
        wire_state: the memory of compression.

    Attributes:
        buckets: in the order in which they leave.
        plan: who contributes what.
        team: of this worker.
        words: through which the host's workers follow the exchange.
        remote: seconds in each phase of the step before, of workers of other hosts, by rank.
        running: the exchange that is under way.
    """

    def __init__(
        self, terms: Terms, local: HostGroup, place: Place, total: Partial, wire_state: WireState | None
    ) -> None:
        self._terms = terms
        self._local = local
        self.place = place
        self._total = total
        self._wire_state = wire_state
        teams, shards = terms.teams, terms.shards
        team_of = {slot: t for t, crews in enumerate(local.teams) for crew in crews for slot in crew}
        self.team = team_of[local.slot]
        lanes = [team_of[slot] for slot in local.members[: place.hosts.lanes]]
        self.buckets = terms.way.buckets(terms.flat, teams, lanes)
        self._rounds = shards.rounds if shards is not None else 0
        self._continued: Continuation | None = None
        self.crews: Crews = local.teams
        self.plan = ExchangePlan(self.buckets, self.shares(terms, local, place), terms.count)
        self.words = Words(local)
        self.remote: dict[int, list[float]] = {}
        self.running: Future[None] | None = None
        self._heads = Heads(local, self.crews, place, self.plan, teams, total)
        self._closed = False
        self._waiter = replace(local.interruptible, revoked=lambda: self._closed or local.interrupted())
        self._step = 0
        self._exchanged = 0  # the turn that this worker's lane exchanges
        generation = f"{terms.name}/generation {local.generation}"
        self._bulletin = Bulletin(terms.link.store, place.hosts, place.rank, generation)
        bulletin, end = (None, _let_be) if terms.survives else (self._bulletin, self.revoke)
        self.patience = Patience(local, place, bulletin, self._late, end)
        self.readiness = Readiness(
            self.words,
            local.slot,
            [bucket for bucket in self.buckets if bucket.team == self.team],
            self._rounds,
            lambda ready, operation: self.patience.wait(ready, self.running, operation),
        )
        self._wires: list[NetworkWire] = []
        self._thread: Background | None = None
        self._leaders: Leaders | None = None
        self.bulk: Bulk | None = None
        self.data: NetworkWire | None = None
        self.packed: Packed | None = None
        if place.local_rank < place.hosts.lanes:
            try:
                self._connect()
            except BaseException:
                self.close()
                raise

    @staticmethod
    def shares(terms: Terms, local: HostGroup, place: Place) -> tuple[HostShare, ...]:
        """What each host contributes to a step."""
        replica = local.size // len(local.teams[0])  # workers of one
        replicas = [size // replica for size in place.hosts.sizes]
        if terms.shards is not None and terms.shards.rounds:
            return round_shares(len(replicas), terms.count)
        if terms.apart is not None:
            return host_shares(replicas, terms.count, apart_shares(terms.count, terms.apart.replicas, replicas))
        return host_shares(replicas, terms.count)

    def _connect(self) -> None:
        """Join this worker's lane."""
        link, way, lane = self._terms.link, self._terms.way, self.place.local_rank
        on_cpu = replace(link, backend="gloo", device=torch.device("cpu"))
        self.data = self.new_wire("data")
        self._control = control = self.data if link == on_cpu else self._new_wire(on_cpu, "control")
        if way.may_pack and not self.data.ordered:
            self.packed = Packed(self.data)
        self._thread = Background("unisono-exchange", _one_thread)
        if self._terms.apart is not None and lane == 0:
            self.bulk = Bulk(self._new_wire(on_cpu, "bulk"), Background("unisono-bulk", _one_thread))
        self._leaders = Leaders(control, self.call, self._tag(1))
        self.reduce = self._reduction(self.data, control)
        self.lane = Lane(
            buckets=[bucket for bucket in self.buckets if bucket.lane == lane],
            ready=self._is_ready,
            await_ready=self._await_ready,
            reduce=self.reduce,
            done=self._is_summed,
            ordered=self.data.ordered,
            last=(lambda step: self._sum_heads(step, control)) if lane == 0 else None,
            finished=self._heads_are_summed,
        )

    def new_wire(self, kind: str) -> NetworkWire:
        """One more wire of this worker's lane."""
        return self._new_wire(self._terms.link, kind)

    def _new_wire(self, link: Link, kind: str) -> NetworkWire:
        lane, hosts = self.place.local_rank, self.place.hosts
        name = f"{self._terms.name}/generation {self._local.generation}/lane {lane}/{kind}"
        wire = NetworkWire(link, name, self.place.host, len(hosts.sizes), self._explain())
        self._wires.append(wire)
        return wire

    def _explain(self) -> Explain:
        """Why a wait for another host fails: who is to blame is found out where nobody goes on without them."""
        lane, hosts = self.place.local_rank, self.place.hosts

        def blame(peer: int, operation: str, deadline: str) -> GroupError:
            return self._bulletin.explain(hosts.rank(peer, lane), operation, deadline)

        def say(peer: int, operation: str, deadline: str) -> GroupError:
            name = hosts.name(hosts.rank(peer, lane))
            if deadline:
                return WaitTimeout(f"{operation}: {name} did not answer ({deadline})")
            return PeerLost(f"{operation}: {name} is gone (connection lost)")

        return say if self._terms.survives else blame

    def _reduction(self, data: NetworkWire, control: NetworkWire) -> Canonical | RoundSums | Algorithm | Compressed:
        """How this lane sums a bucket."""
        way, flat, count, shards = self._terms.way, self._terms.flat, self._terms.count, self._terms.shards
        share = self.plan.shares[self.place.host]
        sums = HostSums(self._local, self.crews, flat, share, self._total, count)
        carrier = self.packed or data
        ends = Ends(carrier, carrier if control is data else control, flat, sums, self._total)
        if way.compression is not None:
            assert self._wire_state is not None
            return Compressed(ends, way.compression, self._wire_state)
        if shards is not None and self._rounds:
            leaves, most = accumulation(0, count, count)
            local = self._local
            pending = [local.view(local.slot, self._rounds + 1 + number) for number in range(most)]
            return RoundSums(carrier, control, shards, leaves, self.leaf, pending, self._total, self._release_gradient)
        if way.algorithm == "canonical":  # which it is wherever hosts share one state
            parts: Parts = shards.gradients if shards is not None else equal_parts(data.size)
            return Canonical(carrier, control, self.plan, flat, sums, self._total, parts, back=shards is None)
        return Algorithm(ends, lambda size_bytes: way.choose(data, size_bytes))

    @property
    def leaders(self) -> Leaders:
        """On the first worker of every host: what says something to the others between steps."""
        assert self._leaders is not None
        return self._leaders

    @property
    def closed(self) -> bool:
        """Whether it is given up."""
        return self._closed

    @property
    def has_lane(self) -> bool:
        """Whether this worker exchanges anything."""
        return self._thread is not None

    def follow(self, continued: Continuation | None) -> None:
        """Sum what is left of a step that others have begun; None for a step that these begin."""
        if continued is self._continued:
            return
        self._continued, local, terms = continued, self._local, self._terms
        self.crews = local.all_teams if continued is not None else local.teams
        shares = continued.shares if continued is not None else self.shares(terms, local, self.place)
        self.plan = ExchangePlan(self.buckets, shares, terms.count)
        self._heads = Heads(local, self.crews, self.place, self.plan, terms.teams, self._total)
        if self.data is not None:
            self.reduce = self.lane.reduce = self._reduction(self.data, self._control)

    def own_nodes(self) -> list[Node]:
        """What this worker has to publish in a step, or did before others went on with it."""
        crews = self.crews[self.team]
        mine = next(number for number, crew in enumerate(crews) if self._local.slot in crew)
        return [part.node for part in self.plan.shares[self.place.host].parts if part.replica == mine]

    def begin(self, step: int) -> None:
        """Let the exchange of a step begin as its buckets come."""
        self._step = step
        self.readiness.begin(step)
        if self._continued is not None and not self._continued.left[self.place.rank]:
            self.readiness.end()
        if self._thread is not None:
            self.running = self._thread.submit(lambda: self._exchange(step))

    def leaf(self, number: int) -> Partial:
        """This worker's micro-batch of a round."""
        local = self._local
        return local.partial(number).over(local.view(local.slot, self._rounds))

    def _release_gradient(self, segment: int, start: int, stop: int) -> None:
        """Elements of this worker's gradient have been summed."""
        local, size = self._local, item_size(self._terms.flat.segment_dtypes[segment])
        field = local.partials.fields.named[f"segment {segment}"]
        whole = local.layout.partial(local.slot, self._rounds)
        local.arena.release(whole.part(field.offset + start * size, (stop - start) * size))

    @property
    def is_complete(self) -> bool:
        """Whether everything of the step is summed."""
        return self.words.all_summed(self.readiness.last_turn)

    @property
    def flags(self) -> int:
        """Requests of all workers of all hosts, with the step that was summed last."""
        return self.words.flags

    def take_sent_bytes(self) -> int:
        """What was sent since this was asked last."""
        return sum(wire.take_sent_bytes() for wire in self._wires)

    def _late(self) -> set[int]:
        """Local ranks that have not finished their part of an exchange."""
        turn = self.readiness.last_turn
        late = {b.lane for b in self.buckets if not self.words.summed(b.index, turn)}
        if not late and not self.words.summed(len(self.buckets), turn):
            late = {0}
        return late

    def call(self, work: Callable[[], T], operation: str) -> T:
        """Do something with the wire: on its thread, so that this one can be freed."""
        assert self._thread is not None
        running = self._thread.submit(work)
        return self.patience.wait(lambda: running.result() if running.done() else None, running, operation)

    def _exchange(self, step: int) -> None:
        """On the exchange thread: a lane's buckets and, in the first lane, all that is no gradient."""
        rounds = max(1, self._rounds)
        self.lane.exchanging_s = 0.0
        with self.patience.telling():
            for number in range(rounds):
                self._exchanged = self.readiness.turn(number)
                self.lane.run(step, self._exchanged, last=number == rounds - 1, alone=self._terms.is_apart(step))

    def _is_ready(self, bucket: Bucket) -> bool:
        crews = self._local.teams[bucket.team]
        return all(self.words.ready(slot, bucket.index, self._exchanged) for crew in crews for slot in crew)

    def _await_ready(self, bucket: Bucket) -> None:
        """Wait for this worker's gradients of a bucket, and from then on, with a deadline, for its mates'."""
        step, turn, local = self._step, self._exchanged, self._local
        team = {slot for crew in local.teams[bucket.team] for slot in crew}

        def arrived(slot: int) -> bool:
            return slot not in team or self.words.ready(slot, bucket.index, turn)

        self._await_own(lambda: arrived(local.slot), f"bucket {bucket.index} of step {step}")
        self._waiter(
            lambda: True if self._is_ready(bucket) else None,
            f"bucket {bucket.index} of step {step}",
            lambda: local.missing(arrived),
        )

    def _await_own(self, ready: Callable[[], bool], operation: str) -> None:
        """This worker's own backward may take its time: whoever has something to say wakes this thread."""

        def doze(seconds: float) -> None:
            if self.readiness.stirred.wait(DOZE_S):
                self.readiness.stirred.clear()

        own = replace(self._waiter, deadline_s=float("inf"), sleep=doze)
        own(lambda: True if ready() else None, operation, str)

    def _sum_heads(self, step: int, wire: NetworkWire) -> Reduction:
        """All that is no gradient; this lane may have had no bucket to wait for."""
        foretold = self._foretold(step)
        if foretold is not None:
            own = [m for node in self.own_nodes() for m in foretold.of(node)]
            self._await_own(lambda: foretold.has(step, own), f"losses of step {step}")
        else:
            self._await_own(lambda: self.readiness.over >= step, f"end of step {step}")
        return self._heads(step, wire, self._tag(0), early=foretold is not None)

    def _foretold(self, step: int) -> Foretold | None:
        """Where hosts sum no gradients, and nothing else that a backward may change: what they tell each other early.

        So they wait for each other only where one is behind by more than a backward.
        """
        return self._heads.foretold if self._terms.is_apart(step) and not self._local.partials.buffers else None

    def foretell(self, step: int, micro_batch: int, scalars: Callable[[int], Sequence[float]]) -> None:
        """A micro-batch has been forwarded."""
        foretold = self._foretold(step)
        if foretold is not None:
            foretold.put(step, micro_batch, scalars(foretold.scalars))
            self.readiness.stirred.set()

    def _is_summed(self, bucket: Bucket) -> None:
        store_fence()
        self.words.set_summed(bucket.index, self._exchanged)

    def _heads_are_summed(self) -> None:
        self.remote.update(self._heads.reports)
        self.words.flags = self._heads.flags
        store_fence()
        self.words.set_summed(len(self.buckets), self._exchanged)

    def _tag(self, number: int) -> int:
        """Tags of what is no bucket."""
        return (len(self.buckets) + number) * TAGS_A_BUCKET

    def revoke(self, cause: str = "") -> None:
        """End this generation on this host, and free whoever waits on its wires."""
        self._local.revoke(cause)
        self._free()

    def _free(self) -> None:
        for wire in self._wires:
            wire.revoke()

    def tell(self, cause: BaseException) -> None:
        """Post why this worker ends."""
        self.patience.tell(cause)

    def close(self) -> None:
        """Let go of the wires and their thread; others that still wait on them fail."""
        self._closed = True
        self.readiness.stirred.set()
        self._free()
        for thread in (self._thread, self.bulk.thread if self.bulk is not None else None):
            if thread is not None:
                thread.close(held_up=lambda: any(wire.awaits for wire in self._wires))
        for wire in self._wires:
            wire.close()


def _let_be(cause: str) -> None:
    """Others go on."""


def _one_thread() -> None:
    torch.set_num_threads(1)
