"""Engines of workers that push to a parameter server spread over several hosts, or kept by processes of their own."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from unisono.agreeing import Parts
from unisono.comm.calls import Answering, Asking, Endpoint, Handler
from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.locks import Locks
from unisono.comm.numbers import ArenaNumbers
from unisono.comm.patience import GRACE_S
from unisono.comm.waiting import Waiter
from unisono.engines.asynchronous import AsynchronousEngine
from unisono.engines.meeting import Across
from unisono.engines.spread_rounds import SpreadRoundsEngine
from unisono.engines.units import clipped_by
from unisono.errors import GroupError, LaunchError
from unisono.events import WireUse
from unisono.plan.homes import POOL_HOST, Homes
from unisono.plan.hosts import Place
from unisono.plan.pool import Pool
from unisono.plan.rounds import RoundsPool
from unisono.pushing import recording, recording_rounds, servers_for, turns_of
from unisono.sync.bringing import Part
from unisono.sync.brought import Brought, Need
from unisono.sync.claims import AskedClaims, Claims
from unisono.sync.policy import Executes, Outcome
from unisono.sync.pulled import PulledValues
from unisono.sync.round_updates import RoundUpdates, Squares
from unisono.sync.server import Servers
from unisono.sync.serving import Gate, Serving
from unisono.sync.serving_rounds import ServingRounds
from unisono.sync.spread import SpreadServers
from unisono.sync.turns import AskedTurns, GivesUnits, NoTurns

LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class Connections:
    """Those of one worker to others that share no memory with it, or whom it lets update servers.

    Attributes:
        answering: its own end, where others ask it; None where nobody does.
        asked: the workers that it asks as it computes, by rank, in order of host.
        peers: those that it asks as it updates servers.
        faults: what could not be answered because of a fault here.
    """

    answering: Answering | None = None
    asked: dict[int, Asking] = field(default_factory=dict)
    peers: dict[int, Asking] = field(default_factory=dict)
    faults: list[BaseException] = field(default_factory=list)

    @property
    def first(self) -> Asking:
        """To the first host: the one that hands out units."""
        return next(iter(self.asked.values()))

    def take_use(self, elsewhere: Callable[[int], bool]) -> WireUse:
        """What was sent since this was asked last, and how long this worker has waited for answers.

        Arguments:
            elsewhere: whether a rank is on another host.
        """
        ends = (*self.asked.items(), *self.peers.items())
        sent = sum(asking.take_sent_bytes() for rank, asking in ends if elsewhere(rank))
        sent += self.answering.take_sent_bytes() if self.answering is not None else 0
        waited_s = 0.0
        for asking in self.asked.values():
            waited_s, asking.waited_s = waited_s + asking.waited_s, 0.0
        return WireUse(sent, waited_s, waited_s)

    def failed_with(self, error: BaseException) -> BaseException:
        """Let go of all where a worker cannot be put together; why that is so."""
        self.close(error)
        return self.faults[0] if self.faults and isinstance(error, GroupError) else error

    def close(self, cause: BaseException | None = None) -> None:
        """Let go of all.

        Arguments:
            cause: why, where others may still wait for an answer.
        """
        for asking in (*self.asked.values(), *self.peers.values()):
            asking.close()
        if self.answering is not None:
            self.answering.close(cause)


@dataclass(frozen=True, slots=True)
class Answerable:
    """An engine of a worker that answers others: a fault on a thread that does so is its own."""

    engine: Executes
    faults: list[BaseException]

    def step(self, step: int, *, check_purity: bool = False, last: bool = False) -> Outcome:
        """See `Executes`."""
        try:
            return self.engine.step(step, check_purity=check_purity, last=last)
        except GroupError as error:
            if self.faults:
                raise self.faults[0] from error
            raise


@dataclass(slots=True)
class _Spread:
    """What both engines are made of.

    Attributes:
        servers: as this worker itself sees them.
        gate: of this host's.
        waiter: how threads wait that answer.
        entries: of the model's buffers.
    """

    parts: Parts
    group: Group
    address: str | None
    homes: Homes
    locks: Locks
    pool: Pool | RoundsPool
    pulled: PulledValues
    servers: Servers
    gate: Gate
    waiter: Waiter
    entries: range

    @property
    def place(self) -> Place:
        """This worker's."""
        return self.parts.prepared.place

    def of_thread(self) -> Servers:
        """Those of this host, for a thread that answers; what it computes has the bits of the worker's own."""
        torch.set_num_threads(self.parts.config.threads)
        torch.set_grad_enabled(False)
        here = self.homes.on(self.place.host)
        return servers_for(self.parts, self.place.rank, self.pool, self.locks, self.pulled, here)

    def connect(self, handler: Callable[[], Handler], *, peers: bool) -> Connections:
        """Let others ask, and connect to those that this worker asks.

        Arguments:
            peers: whoever updates servers asks those who update others.
        """
        homes, rank, local, name = self.homes, self.place.rank, self.parts.local, self.place.hosts.name
        connections = Connections()

        def failed(error: BaseException) -> None:
            if not isinstance(error, GroupError):
                connections.faults.append(error)
            local.revoke(f"{name(rank)} could not answer another worker: {error}")

        askers = len(homes.askers(rank))
        askers += sum(rank in homes.peers(other) for other in range(homes.hosts.size)) if peers else 0
        try:
            if askers:
                where = self.address if len(homes.hosts.sizes) > 1 else LOOPBACK
                connections.answering = Answering(where, askers, handler, failed)
            own = connections.answering
            told = json.dumps(own.endpoint.written()).encode() if own is not None else b""
            endpoints = self.group.all_gather(told, "where workers answer each other")
            patient = replace(local.waiter.of_worker(), deadline_s=local.deadline_s + GRACE_S)  # who answers may wait

            def asking(other: int) -> Asking:
                return Asking(Endpoint.read(json.loads(endpoints[other])), name(other), patient)

            for other in homes.asked(rank):
                connections.asked[other] = asking(other)
            for other in homes.peers(rank) if peers else ():
                connections.peers[other] = asking(other)
        except BaseException as error:
            connections.close(error)
            if isinstance(error, LaunchError):
                raise LaunchError(f"{name(rank)}: {error}") from error
            raise
        return connections

    def values(self, connections: Connections) -> SpreadServers:
        """What this worker computes with, as the servers have it now."""
        host_of = self.place.hosts.place
        elsewhere = [(asking, self.homes.on(host_of(other)[0])) for other, asking in connections.asked.items()]
        values = SpreadServers(self.servers, self.place.rank, elsewhere, self.pulled, self.gate, self.entries)
        values.pull()
        return values

    def across(self, connections: Connections) -> Across | None:
        """The workers of all hosts, where there are several."""
        if not isinstance(self.group, HierarchicalGroup):
            return None
        place = self.place

        def elsewhere(rank: int) -> bool:
            return place.hosts.place(rank)[0] != place.host

        return Across(self.group, lambda: connections.take_use(elsewhere))


def spread_engine(
    parts: Parts, group: Group, address: str | None, locks: Locks, pulled: PulledValues
) -> tuple[Executes, Connections]:
    """An engine over servers some of which this worker, or another, does not reach itself; and its connections.

    Arguments:
        group: the workers of all hosts.
        address: of this host, as others reach it.
        locks: of the pool, and of servers.
        pulled: what this worker computes with.
    """
    local, layout, pool = parts.local, parts.prepared.layout, parts.pool()
    assert isinstance(pool, Pool | RoundsPool)
    entries = range(len(layout.flat.uses), len(layout.flat.uses) + len(layout.buffers))
    homes, rank = parts.prepared.homes(parts.config), parts.prepared.place.rank
    servers = servers_for(parts, rank, pool, locks, pulled)  # before anyone can ask: it makes optimizers' first state
    gate, waiter = Gate(local.waiter), local.waiter.of_thread()
    spread = _Spread(parts, group, address, homes, locks, pool, pulled, servers, gate, waiter, entries)
    make = _rounds if isinstance(pool, RoundsPool) else _asynchronous
    engine, connections = make(spread)
    return Answerable(engine, connections.faults), connections


def _asynchronous(spread: _Spread) -> tuple[Executes, Connections]:
    """Where workers wait for nobody."""
    parts, homes, rank, pool = spread.parts, spread.homes, spread.place.rank, spread.pool
    assert isinstance(pool, Pool)
    turns: GivesUnits | None = None
    of_threads: GivesUnits | None = None
    if spread.place.host == POOL_HOST:
        turns = turns_of(parts, pool, spread.locks, parts.local.waiter, homes.computing)
        of_threads = turns_of(parts, pool, spread.locks, spread.waiter, homes.computing)

    def handler() -> Serving:
        return Serving(spread.of_thread(), of_threads, spread.gate, spread.entries)

    connections = spread.connect(handler, peers=False)
    try:
        values = spread.values(connections)
        of_pool: GivesUnits = NoTurns()
        if not homes.serves(rank):
            of_pool = turns or AskedTurns(connections.first)
        engine = AsynchronousEngine(
            parts.local,
            parts.units(),
            rank,
            values,
            pool,
            of_pool,
            spread.locks,
            parts.pace,
            parts.phases,
            parts.keep,
            recording(parts),
            spread.across(connections),
            spread.place.hosts.name,
        )
    except BaseException as error:
        raise connections.failed_with(error) from error
    return engine, connections


def _rounds(spread: _Spread) -> tuple[Executes, Connections]:
    """Where the first gradients of each round count."""
    parts, homes, rank, host, pool = spread.parts, spread.homes, spread.place.rank, spread.place.host, spread.pool
    assert isinstance(pool, RoundsPool)
    prepared, local, units, clip = parts.prepared, parts.local, parts.units(), parts.pace.clip
    hosts, name = range(len(homes.hosts.sizes)), homes.hosts.name
    flat, place_of = prepared.layout.flat, homes.hosts.place
    on = {other: [prepared.servers[number] for number in homes.on(other)] for other in hosts}
    needs = {other: Need.of(flat, on[other], buffers=other == POOL_HOST) for other in hosts}
    first = units.buffers * (1 + pool.layout.accepted)
    claims = Claims(parts.claims(), spread.locks, local.waiter, name) if host == POOL_HOST else None
    of_threads = Claims(parts.claims(), spread.locks, spread.waiter, name) if host == POOL_HOST else None
    late = claims.late if claims is not None else None
    brought = Brought(pool, spread.locks, needs[host], local.slot, local.view, first, late)
    squares = None
    if clip is not None:
        runs_here = [run for runs in on[host] for run in runs]
        squares = Squares(ArenaNumbers(local, local.layout.numbers("squares", 0), "norms"), runs_here, [])

    def updates(servers: Servers) -> RoundUpdates:
        clipped = functools.partial(clipped_by, clip)
        return RoundUpdates(servers, homes.on(host), brought, units.together, clipped, squares)

    def handler() -> ServingRounds:
        return ServingRounds(
            lambda: updates(spread.of_thread()), brought, of_threads, squares, spread.gate, spread.waiter
        )

    connections = spread.connect(handler, peers=clip is not None)
    try:
        if squares is not None:
            squares.others.extend(connections.peers.values())
        values = spread.values(connections)
        part = None
        if not homes.serves(rank):
            elsewhere = [(asking, needs[place_of(other)[0]]) for other, asking in connections.asked.items()]
            own = updates(spread.servers) if homes.reaches(rank, host) else None
            part = Part(claims or AskedClaims(connections.first), brought, own, elsewhere)
        engine = SpreadRoundsEngine(
            local,
            units,
            rank,
            values,
            brought,
            part,
            claims,
            parts.phases,
            parts.keep,
            recording_rounds(parts),
            spread.across(connections),
        )
    except BaseException as error:
        raise connections.failed_with(error) from error
    return engine, connections
