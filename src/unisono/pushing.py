"""Engines of workers that wait for nobody within a step, put together: lock-free, or over a parameter server, which may
be spread over several hosts."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unisono.agreeing import Parts
from unisono.asynchronous import AsynchronousEngine
from unisono.comm.calls import Answering, Asking, Endpoint
from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.locks import Locks
from unisono.comm.patience import GRACE_S
from unisono.events import WireUse
from unisono.meeting import Across, Done
from unisono.plan.assignment import runs
from unisono.plan.homes import POOL_HOST, Homes
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool
from unisono.plan.rounds import RoundsPool
from unisono.plan.unit_pool import Words
from unisono.replaying import ReplayEngine, RoundsReplayEngine
from unisono.rounds import RoundsEngine
from unisono.state.order import write_order, write_rounds
from unisono.sync.commits import Commits
from unisono.sync.damping import DampedRates
from unisono.sync.divided import servers_of
from unisono.sync.hogwild import LockFreeValues
from unisono.sync.policy import Executes
from unisono.sync.pulled import PulledValues
from unisono.sync.server import Servers
from unisono.sync.serving import Gate, Serving
from unisono.sync.spread import AskedTurns, SpreadServers
from unisono.sync.tables import members
from unisono.sync.turns import GivesUnits, NoTurns, Turns
from unisono.sync.updater import Updater

LOOPBACK = "127.0.0.1"
_NONE: Words = np.zeros(0, dtype=np.int64)
"""In place of the rows of tables, where there are none."""


@dataclass(slots=True)
class Connections:
    """Those of one worker to others that share no memory with it.

    Attributes:
        answering: its own end, where others ask it; None where nobody does.
        asking: those that it asks.
    """

    answering: Answering | None
    asking: dict[int, Asking]

    def close(self) -> None:
        """Let go of all."""
        for asking in self.asking.values():
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
    if isinstance(pool, Pool) and any(map(homes.asked, range(homes.hosts.size))):
        return _spread_engine(parts, group, address, locks, pool, pulled, homes)
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
        run_dir = _recorded(parts)

        def record_rounds(step: int, rounds: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]]) -> None:
            if run_dir is not None:
                write_rounds(run_dir, step, rounds, sums)

        return RoundsEngine(local, units, servers, pool, locks, pace, phases, parts.keep, record_rounds)
    turns, write = _turns(parts, pool, locks), _recording(parts)
    return AsynchronousEngine(local, units, local.slot, servers, pool, turns, locks, pace, phases, parts.keep, write)


def _recorded(parts: Parts) -> Path | None:
    """Where the order of pushes goes; None where it is not wanted."""
    run_dir = parts.config.run_dir
    return Path(run_dir) if parts.config.sync.record and run_dir is not None else None


def _recording(parts: Parts) -> Callable[[int, Done], None] | None:
    """Keeps the order of a step's pushes, on the first host; None where that is not wanted."""
    run_dir = _recorded(parts)
    if run_dir is None:
        return None

    def write(step: int, done: Done) -> None:
        if done.taken is not None and parts.prepared.place.host == 0:
            write_order(run_dir, step, done.taken.order, done.taken.base, done.taken.sums)

    return write


def _spread_engine(
    parts: Parts, group: Group, address: str | None, locks: Locks, pool: Pool, pulled: PulledValues, homes: Homes
) -> tuple[Executes, Connections]:
    """An engine over servers some of which this worker, or another, does not reach itself.

    Arguments:
        address: as of `pushing_engine`.
    """
    config, local, place = parts.config, parts.local, parts.prepared.place
    flat, rank = parts.prepared.layout.flat, place.rank
    entries = range(len(flat.uses), len(flat.uses) + len(parts.prepared.layout.buffers))
    gate = Gate(local.deadline_s, local.is_revoked)
    pool_is_here = place.host == POOL_HOST
    turns: GivesUnits | None = _turns(parts, pool, locks, homes.computing) if pool_is_here else None

    def handler() -> Serving:
        torch.set_num_threads(config.threads)
        torch.set_grad_enabled(False)
        return Serving(_servers(parts, rank, pool, locks, pulled), turns, gate, entries)

    def failed(error: BaseException) -> None:
        local.revoke(f"{place.hosts.name(rank)} could not answer another worker: {error}")

    answering = None
    if askers := homes.askers(rank):
        where = address if len(place.hosts.sizes) > 1 else LOOPBACK
        answering = Answering(where, len(askers), handler, failed)
    connections = Connections(answering, {})
    try:
        told = json.dumps(answering.endpoint.written()).encode() if answering is not None else b""
        endpoints = group.all_gather(told, "where workers answer each other")
        patient = replace(local.waiter, deadline_s=local.deadline_s + GRACE_S)  # who answers may wait first
        for other in homes.asked(rank):
            endpoint = Endpoint.read(json.loads(endpoints[other]))
            connections.asking[other] = Asking(endpoint, place.hosts.name(other), patient)
        elsewhere = [(connections.asking[other], homes.on(place.hosts.place(other)[0])) for other in homes.asked(rank)]
        values = SpreadServers(_servers(parts, rank, pool, locks, pulled), rank, elsewhere, pulled, gate, entries)
        values.pull()
    except BaseException:
        connections.close()
        raise
    of_pool: GivesUnits = NoTurns()
    if not homes.serves(rank):
        of_pool = turns or AskedTurns(connections.asking[homes.asked(rank)[POOL_HOST]])
    engine = AsynchronousEngine(
        local,
        parts.units(),
        rank,
        values,
        pool,
        of_pool,
        locks,
        parts.pace,
        parts.phases,
        parts.keep,
        _recording(parts),
        Across(group, lambda: _wire_use(connections, values)) if isinstance(group, HierarchicalGroup) else None,
    )
    return engine, connections


def _wire_use(connections: Connections, values: SpreadServers) -> WireUse:
    sent = sum(asking.take_sent_bytes() for asking in connections.asking.values())
    sent += connections.answering.take_sent_bytes() if connections.answering is not None else 0
    waited_s = values.take_waited_s()
    return WireUse(sent, waited_s, waited_s)
