"""One step on all ranks of a job, event by event: timetables, messages that share links, stragglers and jitter.

Ranks of a layer compute in lockstep (they sum inside it), so that the slowest holds up its team. Replicas that are
alike are simulated once and count for all: those whose ranks are equally fast and share nodes in the same way.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unisono.errors import ConfigurationError
from unisono.plan.fabric import Fabric, Flow, Link
from unisono.plan.schedule import Action, Kind, Timetable, timetable

SPINE, CORES = "spine", "cores"
MOST_EVENTS = 20_000_000
"""After which a simulation would take minutes."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is made of.

    Attributes:
        schedule, virtual: of the pipeline.
        team: ranks that compute a layer or a sequence together.
        stages: workers of a pipeline.
        replicas: of it.
        micro_batches: of each.
        seconds: of each kind of action, by (kind, stage of the model).
        message_bytes: that each rank hands on to the next stage.
        exchange_s: of gradients, by worker of the pipeline, when all replicas are ready.
        update_s: after that, until the next step begins.
    """

    schedule: str
    virtual: int
    team: int
    stages: int
    replicas: int
    micro_batches: int
    seconds: Mapping[tuple[Kind, int], float]
    message_bytes: float
    exchange_s: tuple[float, ...]
    update_s: float

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.team * self.stages * self.replicas

    def rank(self, replica: int, worker: int, member: int) -> int:
        """Members are neighbours, then replicas, then workers of a pipeline."""
        return (worker * self.replicas + replica) * self.team + member


@dataclass(frozen=True, slots=True)
class Wires:
    """What joins ranks.

    Attributes:
        node: ranks of a node.
        within: bytes a second between two of a node.
        port: bytes a second of each rank between nodes.
        ports: of a node, which its ranks share; default: one a rank.
        spine: bytes a second that all messages between nodes share; None: as much as all ports.
        cores: of a node, which its ranks share as they compute; None: each rank has a device of its own.
    """

    node: int
    within: float
    port: float
    ports: int | None = None
    spine: float | None = None
    cores: int | None = None

    @property
    def node_rate(self) -> float:
        """Bytes a second into or out of a node."""
        return self.port * (self.ports if self.ports is not None else self.node)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes otherwise than planned.

    Attributes:
        slow: ranks and how many times slower each is.
        jitter: deviation of each action's logarithm.
        seed: of the jitter.
    """

    slow: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0


class Span(NamedTuple):
    """An action of a worker of a replica, from when to when."""

    replica: int
    worker: int
    action: Action
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Step:
    """What happened.

    Attributes:
        seconds: until all ranks can begin the next step.
        computed_s: until the last action of a timetable was over.
        spans: of the replicas that were simulated.
        counts: how many replicas each of them stands for.
        busy_s: seconds of computing, of all workers of all replicas.
        waited_s: of a worker on average, until the last action of any.
        sent_bytes: between nodes, by all.
        events: that were handled.
    """

    seconds: float
    computed_s: float
    spans: tuple[Span, ...]
    counts: Mapping[int, int]
    busy_s: float
    waited_s: float
    sent_bytes: float
    events: int

    @property
    def bubble(self) -> float:
        """The part of the time until the last action in which workers wait."""
        return self.waited_s / self.computed_s if self.computed_s else 0.0


def simulate(work: Work, wires: Wires, trouble: Trouble | None = None, *, collapse: bool = True) -> Step:
    """Let a step happen.

    Arguments:
        collapse: replicas that are alike are simulated once.

    Raises:
        ConfigurationError: for what cannot be: ranks that are not there, links that carry nothing, or too much.
    """
    trouble = trouble or Trouble()
    _refuse(work, wires, trouble)
    counts = _alike(work, wires, trouble) if collapse else dict.fromkeys(range(work.replicas), 1)
    table = timetable(work.schedule, work.stages, range(work.micro_batches), work.virtual)
    actions = sum(len(own) for own in table.workers) * len(counts)
    if actions * (1 if collapse else work.team) > MOST_EVENTS:
        raise ConfigurationError(
            f"{len(counts)} unlike replicas of {work.stages} stages and {work.micro_batches} micro-batches are "
            f"{actions:,} actions; simulate fewer micro-batches, or without jitter"
        )
    return _Run(work, wires, trouble, table, counts, separately=not collapse).happen()


def _refuse(work: Work, wires: Wires, trouble: Trouble) -> None:
    if unknown := [rank for rank in trouble.slow if not 0 <= rank < work.ranks]:
        raise ConfigurationError(f"rank {unknown[0]} is slow, and the job has ranks 0 to {work.ranks - 1}")
    if wrong := [factor for factor in trouble.slow.values() if not 0 < factor < math.inf]:
        raise ConfigurationError(f"a rank is {wrong[0]:g} times slower; give a factor above 0")
    if min(wires.within, wires.port, wires.node_rate, wires.spine or 1.0) <= 0:
        raise ConfigurationError("a link carries 0 bytes a second; give a rate above 0")
    if trouble.jitter < 0:
        raise ConfigurationError(f"jitter is {trouble.jitter:g}; give 0 or more")


def _alike(work: Work, wires: Wires, trouble: Trouble) -> dict[int, int]:
    """Replicas to simulate, and how many each stands for: of those that share nodes, all are."""
    together = math.lcm(wires.node, work.team) // work.team
    if trouble.jitter > 0 or work.replicas % together or (work.replicas * work.team) % wires.node:
        return dict.fromkeys(range(work.replicas), 1)
    slow = {rank: factor for rank, factor in trouble.slow.items() if factor != 1}
    by_replica: dict[int, list[tuple[int, int, float]]] = {}
    for rank, factor in slow.items():
        row, member = divmod(rank, work.team)
        worker, replica = divmod(row, work.replicas)
        by_replica.setdefault(replica, []).append((worker, member, factor))
    first: dict[tuple[object, ...], int] = {}
    counts: dict[int, int] = {}
    for block in range(work.replicas // together):
        members = range(block * together, (block + 1) * together)
        key = tuple(tuple(sorted(by_replica.get(replica, ()))) for replica in members)
        begin = first.setdefault(key, block * together)
        for offset in range(together):
            counts[begin + offset] = counts.get(begin + offset, 0) + 1
    return counts


class _Run:
    """One simulation: a heap of what will happen, and what has."""

    def __init__(
        self, work: Work, wires: Wires, trouble: Trouble, table: Timetable, counts: dict[int, int], *, separately: bool
    ) -> None:
        self.work, self.wires, self.trouble, self.table, self.counts = work, wires, trouble, table, counts
        self.separately = separately  # a team's messages, one flow a rank
        self.lists = [[action for action in own if action.kind.computes] for own in table.workers]
        self.factors = {(r, w): self._factors(r, w) for r in counts for w in range(work.stages)}
        self.next = dict.fromkeys(self.factors, 0)
        self.is_busy = dict.fromkeys(self.factors, False)
        self.there: set[tuple[int, Action]] = set()
        self.heap: list[tuple[float, int, int, object]] = []
        self.spans: list[Span] = []
        self.order = self.events = 0
        self.sent_bytes = 0.0
        nodes = -(-work.ranks // wires.node)
        rates: dict[Link, float] = {(way, n): wires.node_rate for way in ("out", "in") for n in range(nodes)}
        rates[SPINE] = wires.spine if wires.spine is not None else float("inf")
        if wires.cores is not None:
            rates |= {(CORES, n): float(wires.cores) for n in range(nodes)}
            rates |= {(CORES, *key): 1.0 for key in self.factors}
        self.fabric = Fabric(rates)
        self.under_way: dict[int, tuple[int, tuple[Any, ...]]] = {}
        self.missing: dict[tuple[int, Action], int] = {}

    def _factors(self, replica: int, worker: int) -> NDArray[np.float64]:
        """How much longer each action of a worker takes: its slowest member's."""
        count = len(self.lists[worker])
        members = [self.work.rank(replica, worker, member) for member in range(self.work.team)]
        slow = np.array([self.trouble.slow.get(rank, 1.0) for rank in members])
        if not self.trouble.jitter:
            return np.full(count, slow.max())
        noise = (np.random.default_rng((self.trouble.seed, rank)).standard_normal(count) for rank in members)
        return np.asarray(
            np.max([f * np.exp(self.trouble.jitter * n) for f, n in zip(slow, noise, strict=True)], axis=0)
        )

    def _push(self, when: float, kind: int, what: object) -> None:
        self.order += 1
        heapq.heappush(self.heap, (when, self.order, kind, what))

    def happen(self) -> Step:
        for key in self.factors:
            self._try(0.0, *key)
        while self.heap:
            now, _, kind, what = heapq.heappop(self.heap)
            self.events += 1
            if kind == _COMPUTED:
                self._computed(now, *what)  # type: ignore[misc]
            elif kind == _HANDED:
                self._handed(now, *what)  # type: ignore[misc]
            else:
                self._flowed(now, *what)  # type: ignore[misc]
        return self._finish()

    def _needs(self, action: Action) -> list[Action]:
        kind, i, s = action.kind, action.micro_batch, action.stage
        last = self.table.stages - 1
        if kind is Kind.FORWARD:
            return [Action(Kind.FORWARD, i, s - 1)] if s else []
        if kind is Kind.WEIGHT:
            return []
        return [Action(kind, i, s + 1)] if s < last else []

    def _try(self, now: float, replica: int, worker: int) -> None:
        """Begin a worker's next action, where all that it needs is there."""
        key = (replica, worker)
        at = self.next[key]
        if self.is_busy[key] or at == len(self.lists[worker]):
            return
        action = self.lists[worker][at]
        if any((replica, needed) not in self.there for needed in self._needs(action)):
            return
        self.is_busy[key] = True
        took = self.work.seconds[action.kind, action.stage] * float(self.factors[key][at])
        what = (replica, worker, action, now)
        if self.wires.cores is None:
            self._push(now + took, _COMPUTED, what)
            return
        shared = (CORES, self._node(replica, worker, 0))
        flow = Flow((shared, (CORES, *key)), {shared: self.work.team}, took, now)  # seconds of a core, not bytes
        self._let(now, flow, _COMPUTED, what)

    def _computed(self, now: float, replica: int, worker: int, action: Action, begin: float) -> None:
        key = (replica, worker)
        self.spans.append(Span(replica, worker, action, begin, now))
        self.is_busy[key] = False
        self.next[key] += 1
        self._hand_on(now, replica, worker, action)
        self._try(now, replica, worker)

    def _hand_on(self, now: float, replica: int, worker: int, action: Action) -> None:
        """What was made goes to the stage that waits for it."""
        kind, s = action.kind, action.stage
        to = s + 1 if kind is Kind.FORWARD else s - 1
        if kind is Kind.WEIGHT or not 0 <= to < self.table.stages:
            return
        there = self.table.placement[to]
        if there == worker:
            self._arrived(now, replica, action, there)
            return
        members = range(self.work.team)
        ways = [(self._node(replica, worker, m), self._node(replica, there, m)) for m in members]
        self.sent_bytes += self.counts[replica] * self.work.message_bytes * sum(a != b for a, b in ways)
        groups: dict[tuple[int, int], int] = {}
        for way in ways:
            groups[way] = groups.get(way, 0) + 1
        between = [(way, count) for way, count in groups.items() if way[0] != way[1]]
        flows = [(way, 1) for way, count in between for _ in range(count)] if self.separately else between
        self.missing[replica, action] = len(flows) + (len(between) < len(groups))
        if len(between) < len(groups):
            self._push(now + self.work.message_bytes / self.wires.within, _HANDED, (replica, action, there))
        for (a, b), alike in flows:
            links: tuple[Link, ...] = (("out", a), ("in", b), SPINE) if self.wires.spine else (("out", a), ("in", b))
            weights = {link: alike * (self.counts[replica] if link == SPINE else 1) for link in links}
            flow = Flow(links, weights, self.work.message_bytes, now)
            self._let(now, flow, _HANDED, (replica, action, there))

    def _let(self, now: float, flow: Flow, kind: int, what: tuple[Any, ...]) -> None:
        """A flow begins; when it ends, that happens."""
        self.under_way[id(flow)] = (kind, what)
        self._reschedule(self.fabric.begin(now, flow))

    def _node(self, replica: int, worker: int, member: int) -> int:
        return self.work.rank(replica, worker, member) // self.wires.node

    def _reschedule(self, flows: list[Flow]) -> None:
        for flow in flows:
            self._push(flow.since + flow.left / flow.rate, _FLOWED, (flow, flow.version))

    def _flowed(self, now: float, flow: Flow, version: int) -> None:
        if flow.version != version or id(flow) not in self.under_way:
            return
        kind, what = self.under_way.pop(id(flow))
        self._reschedule(self.fabric.end(now, flow))
        if kind == _COMPUTED:
            self._computed(now, *what)
            return
        self._handed(now, *what)

    def _handed(self, now: float, replica: int, action: Action, there: int) -> None:
        """What some members of a team were to get is there."""
        self.missing[replica, action] -= 1
        if not self.missing[replica, action]:
            self._arrived(now, replica, action, there)

    def _arrived(self, now: float, replica: int, action: Action, worker: int) -> None:
        self.there.add((replica, action))
        self._try(now, replica, worker)

    def _finish(self) -> Step:
        stuck = [key for key, at in self.next.items() if at < len(self.lists[key[1]])]
        if stuck:
            raise ConfigurationError(f"the timetable never ends: workers {sorted({w for _, w in stuck})} wait")
        ends: dict[int, float] = {}
        for span in self.spans:
            ends[span.worker] = max(ends.get(span.worker, 0.0), span.end)
        computed = max(ends.values())
        exchanged = max(end + self.work.exchange_s[worker] for worker, end in ends.items())
        busy = sum(self.counts[span.replica] * (span.end - span.begin) for span in self.spans)
        workers = self.work.replicas * self.work.stages
        return Step(
            exchanged + self.work.update_s,
            computed,
            tuple(self.spans),
            self.counts,
            busy,
            computed - busy / workers,
            self.sent_bytes,
            self.events,
        )


_COMPUTED, _FLOWED, _HANDED = range(3)
