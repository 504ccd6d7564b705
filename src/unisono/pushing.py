"""Engines of workers that wait for nobody within a step, put together: lock-free, or over a parameter server, which may
be spread over several hosts."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from unisono.agreeing import Parts
from unisono.asynchronous import AsynchronousEngine
from unisono.comm.calls import Answering, Asking, Endpoint, Handler
from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.locks import Locks
from unisono.comm.numbers import ArenaNumbers
from unisono.comm.patience import GRACE_S
from unisono.comm.waiting import Waiter
from unisono.events import WireUse
from unisono.meeting import Across, Done
from unisono.plan.assignment import runs
from unisono.plan.homes import POOL_HOST, Homes
from unisono.plan.hosts import Place
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool
from unisono.plan.rounds import RoundsPool
from unisono.plan.unit_pool import Words
from unisono.replaying import ReplayEngine, RoundsReplayEngine
from unisono.rounds import RoundsEngine
from unisono.spread_rounds import SpreadRoundsEngine
from unisono.state.order import write_order, write_rounds
from unisono.sync.brought import Brought, Need
from unisono.sync.claims import Claims
from unisono.sync.commits import Commits
from unisono.sync.damping import DampedRates
from unisono.sync.divided import servers_of
from unisono.sync.hogwild import LockFreeValues
from unisono.sync.policy import Executes
from unisono.sync.pulled import PulledValues
from unisono.sync.round_updates import RoundUpdates, Squares
from unisono.sync.server import Servers
from unisono.sync.serving import Gate, Serving
from unisono.sync.serving_rounds import AskedClaims, Part, ServingRounds
from unisono.sync.spread import AskedTurns, SpreadServers
from unisono.sync.tables import members
from unisono.sync.turns import GivesUnits, NoTurns, Turns
from unisono.sync.updater import Updater
from unisono.units import clipped_by

LOOPBACK = "127.0.0.1"
_NONE: Words = np.zeros(0, dtype=np.int64)
"""In place of the rows of tables, where there are none."""


@dataclass(slots=True)
class Connections:
    """Those of one worker to others that share no memory with it.

    Attributes:
        answering: its own end, where others ask it; None where nobody does.
        asked: the workers that it asks as it computes, by rank, in order of host.
        peers: those that it asks as it updates servers.
    """

    answering: Answering | None
    asked: dict[int, Asking] = field(default_factory=dict)
    peers: dict[int, Asking] = field(default_factory=dict)

    @property
    def first(self) -> Asking:
        """To the first host: the one that hands out units."""
        return next(iter(self.asked.values()))

    def take_sent_bytes(self) -> int:
        """What was sent since this was asked last."""
        own = self.answering.take_sent_bytes() if self.answering is not None else 0
        return own + sum(asking.take_sent_bytes() for asking in (*self.asked.values(), *self.peers.values()))

    def close(self) -> None:
        """Let go of all."""
        for asking in (*self.asked.values(), *self.peers.values()):
            asking.close()
        if self.answering is not None:
            self.answering.close()


def pushing_engine(
    parts: Parts, group: Group, address: str | None, locks: Locks, pulled: PulledValues | None
) -> tuple[Executes, Connections | None]:
    """An engine of workers that wait for nobody, and its connections, where there are any.

    Arguments:
        group: the workers of all hosts.
        address: of this host, as others reach it.
        locks: of the pool, and of servers.
        pulled: what this worker computes with, where that is not the state itself.
    """
    pool = parts.pool()
    if isinstance(pool, LockFreePool):
        return _lock_free_engine(parts, locks, pool), None
    assert pulled is not None
    homes = parts.prepared.homes(parts.config)
    if any(map(homes.asked, range(homes.hosts.size))):
        spread = _spread(parts, group, homes, locks, pool, pulled)
        if isinstance(pool, RoundsPool):
            return _spread_rounds(spread, address, pool)
        return _spread_engine(spread, address, pool)
    return _server_engine(parts, locks, pool, pulled), None


def _turns(parts: Parts, pool: Pool | LockFreePool, locks: Locks, counted: Sequence[int] | None = None) -> Turns:
    """The pool's.

    Arguments:
        counted: the numbers of those who compute; default: of this host's workers.
    """
    local, place = parts.local, parts.prepared.place

    def living() -> Sequence[int]:
        return [slot for slot in local.members if not local.roll.is_lost(slot)] if counted is None else counted

    return Turns(pool, locks, local.waiter, parts.pace.bound, living, local.doing, place.hosts.name)


def _lock_free_engine(parts: Parts, locks: Locks, pool: LockFreePool) -> Executes:
    prepared, config = parts.prepared, parts.config
    layout, optimizer, owner = prepared.layout, parts.optimizer(), parts.owner()
    apart = members(prepared.tables)
    dense = [block for block in range(len(layout.flat.blocks)) if block not in apart]
    values = LockFreeValues(
        parts.local.slot,
        owner.prepare(runs(layout.flat, prepared.update, dense, prepared.run_elements), optimizer),
        [(table, parts.state.values[table.parameter]) for table in prepared.tables],
        owner.prepare_buffers(),
        pool,
        locks,
        Updater(layout.flat, optimizer, config.clip),
        optimizer,
        parts.rate,
        parts.versions,
    )
    slot, turns = parts.local.slot, _turns(parts, pool, locks)
    return AsynchronousEngine(
        parts.local, parts.units(), slot, values, pool, turns, locks, parts.pace, parts.phases, parts.keep
    )


def _servers(parts: Parts, worker: int, pool: Pool | RoundsPool, locks: Locks, pulled: PulledValues) -> Servers:
    """All servers, as one worker, or one thread of it, updates them.

    Arguments:
        worker: its number in the pool.
    """
    prepared, optimizer, local = parts.prepared, parts.optimizer(), parts.local
    changed = pool.changed if isinstance(pool, Pool) else _NONE
    return Servers(
        worker,
        servers_of(prepared.servers, parts.owner(), optimizer, prepared.tables, changed),
        pool,
        locks,
        pulled,
        Updater(prepared.layout.flat, optimizer, parts.config.clip),
        DampedRates(optimizer, *parts.rate, parts.config.sync.damping),
        Commits(local.slot, parts.versions, local.header.slot, parts.run_memory, protects=local.survives),
    )


def _server_engine(parts: Parts, locks: Locks, pool: Pool | RoundsPool, pulled: PulledValues) -> Executes:
    config, local, phases, pace, units = parts.config, parts.local, parts.phases, parts.pace, parts.units()
    sync, servers = config.sync, _servers(parts, parts.local.slot, pool, locks, pulled)
    if sync.replay is not None and isinstance(pool, RoundsPool):
        return RoundsReplayEngine(local, units, servers, pace, Path(sync.replay), phases, parts.keep)
    if sync.replay is not None:
        further = functools.partial(PulledValues, parts.state)
        return ReplayEngine(local, units, pulled, further, servers, pace, Path(sync.replay), phases, parts.keep)
    if isinstance(pool, RoundsPool):
        return RoundsEngine(local, units, servers, pool, locks, pace, phases, parts.keep, _recording_rounds(parts))
    turns, write = _turns(parts, pool, locks), _recording(parts)
    return AsynchronousEngine(local, units, local.slot, servers, pool, turns, locks, pace, phases, parts.keep, write)


def _recorded(parts: Parts) -> Path | None:
    """Where the order of pushes goes; None where it is not wanted."""
    run_dir = parts.config.run_dir
    return Path(run_dir) if parts.config.sync.record and run_dir is not None else None


def _recording_rounds(
    parts: Parts,
) -> Callable[[int, Sequence[Sequence[int]], Sequence[tuple[float, float]]], None]:
    """Keeps which units counted in each round of a step, where that is wanted."""
    run_dir = _recorded(parts)

    def write(step: int, rounds: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]]) -> None:
        if run_dir is not None:
            write_rounds(run_dir, step, rounds, sums)

    return write


def _recording(parts: Parts) -> Callable[[int, Done], None] | None:
    """Keeps the order of a step's pushes, on the first host; None where that is not wanted."""
    run_dir = _recorded(parts)
    if run_dir is None:
        return None

    def write(step: int, done: Done) -> None:
        if done.taken is not None and parts.prepared.place.host == 0:
            write_order(run_dir, step, done.taken.order, done.taken.base, done.taken.sums)

    return write


@dataclass(slots=True)
class _Spread:
    """What engines of workers have in common whose servers are spread.

    Attributes:
        gate: of this host's servers.
        waiter: how threads wait that answer.
        entries: of the model's buffers.
    """

    parts: Parts
    group: Group
    homes: Homes
    locks: Locks
    pool: Pool | RoundsPool
    pulled: PulledValues
    gate: Gate
    waiter: Waiter
    entries: range

    @property
    def place(self) -> Place:
        """This worker's."""
        return self.parts.prepared.place

    def begin_thread(self) -> None:
        """What is computed on a thread that answers has the bits of the worker's own."""
        torch.set_num_threads(self.parts.config.threads)
        torch.set_grad_enabled(False)

    def servers(self) -> Servers:
        """For one thread."""
        return _servers(self.parts, self.place.rank, self.pool, self.locks, self.pulled)

    def connect(self, address: str | None, handler: Callable[[], Handler], *, peers: bool) -> Connections:
        """Let others ask, and connect to those that this worker asks.

        Arguments:
            peers: whoever updates servers asks those who update others.
        """
        homes, rank, local = self.homes, self.place.rank, self.parts.local
        name = self.place.hosts.name

        def failed(error: BaseException) -> None:
            local.revoke(f"{name(rank)} could not answer another worker: {error}")

        answering = None
        askers = len(homes.askers(rank))
        askers += sum(rank in homes.peers(other) for other in range(homes.hosts.size)) if peers else 0
        if askers:
            where = address if len(homes.hosts.sizes) > 1 else LOOPBACK
            answering = Answering(where, askers, handler, failed)
        connections = Connections(answering)
        try:
            told = json.dumps(answering.endpoint.written()).encode() if answering is not None else b""
            endpoints = self.group.all_gather(told, "where workers answer each other")
            patient = replace(local.waiter, deadline_s=local.deadline_s + GRACE_S)  # who answers may wait first

            def asking(other: int) -> Asking:
                return Asking(Endpoint.read(json.loads(endpoints[other])), name(other), patient)

            for other in homes.asked(rank):
                connections.asked[other] = asking(other)
            for other in homes.peers(rank) if peers else ():
                connections.peers[other] = asking(other)
        except BaseException:
            connections.close()
            raise
        return connections

    def values(self, connections: Connections) -> SpreadServers:
        """What this worker computes with, as the servers have it now."""
        host_of = self.place.hosts.place
        elsewhere = [(asking, self.homes.on(host_of(other)[0])) for other, asking in connections.asked.items()]
        values = SpreadServers(self.servers(), self.place.rank, elsewhere, self.pulled, self.gate, self.entries)
        values.pull()
        return values

    def across(self, connections: Connections, values: SpreadServers) -> Across | None:
        """The workers of all hosts, where there are several."""
        if not isinstance(self.group, HierarchicalGroup):
            return None

        def wire_use() -> WireUse:
            waited_s = values.take_waited_s()
            return WireUse(connections.take_sent_bytes(), waited_s, waited_s)

        return Across(self.group, wire_use)


def _spread(
    parts: Parts, group: Group, homes: Homes, locks: Locks, pool: Pool | RoundsPool, pulled: PulledValues
) -> _Spread:
    local, layout = parts.local, parts.prepared.layout
    entries = range(len(layout.flat.uses), len(layout.flat.uses) + len(layout.buffers))
    gate = Gate(local.deadline_s, local.is_revoked)
    waiter = replace(local.waiter, told=lambda operation: None)
    return _Spread(parts, group, homes, locks, pool, pulled, gate, waiter, entries)


def _spread_engine(spread: _Spread, address: str | None, pool: Pool) -> tuple[Executes, Connections]:
    """An engine over servers some of which this worker, or another, does not reach itself.

    Arguments:
        address: as of `pushing_engine`.
    """
    parts, homes, rank = spread.parts, spread.homes, spread.place.rank
    turns: GivesUnits | None = None
    if spread.place.host == POOL_HOST:
        turns = _turns(parts, pool, spread.locks, homes.computing)

    def handler() -> Serving:
        spread.begin_thread()
        return Serving(spread.servers(), turns, spread.gate, spread.entries)

    connections = spread.connect(address, handler, peers=False)
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
            _recording(parts),
            spread.across(connections, values),
        )
    except BaseException:
        connections.close()
        raise
    return engine, connections


def _spread_rounds(spread: _Spread, address: str | None, pool: RoundsPool) -> tuple[Executes, Connections]:
    """The same where the first gradients of each round count."""
    parts, homes, rank, host = spread.parts, spread.homes, spread.place.rank, spread.place.host
    prepared, local, units, clip = parts.prepared, parts.local, parts.units(), parts.pace.clip
    hosts = range(len(homes.hosts.sizes))
    flat, place_of = prepared.layout.flat, homes.hosts.place
    on = {other: [prepared.servers[number] for number in homes.on(other)] for other in hosts}
    needs = {other: Need.of(flat, on[other], buffers=other == POOL_HOST) for other in hosts}
    first = units.buffers * (1 + pool.layout.accepted)
    brought = Brought(pool, spread.locks, spread.waiter, local.doing, needs[host], local.slot, local.view, first)
    claims = Claims(parts.claims(), spread.locks, spread.waiter, local.doing) if host == POOL_HOST else None
    squares = None
    if clip is not None:
        runs_here = [run for runs in on[host] for run in runs]
        squares = Squares(ArenaNumbers(local, local.layout.numbers("squares", 0), "norms"), runs_here, [])

    def updates(servers: Servers) -> RoundUpdates:
        clipped = functools.partial(clipped_by, clip)
        return RoundUpdates(servers, homes.on(host), brought, units.together, clipped, squares)

    def handler() -> ServingRounds:
        spread.begin_thread()
        servers = spread.servers()
        return ServingRounds(servers, brought, updates(servers), claims, squares, spread.gate, spread.waiter)

    connections = spread.connect(address, handler, peers=clip is not None)
    try:
        if squares is not None:
            squares.others.extend(connections.peers.values())
        values = spread.values(connections)
        part = None
        if not homes.serves(rank):
            elsewhere = [(asking, needs[place_of(other)[0]]) for other, asking in connections.asked.items()]
            own = updates(spread.servers()) if homes.reaches(rank, host) else None
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
            _recording_rounds(parts),
            spread.across(connections, values),
        )
    except BaseException:
        connections.close()
        raise
    return engine, connections
