"""Engines of workers that push their gradients where all can reach what is updated: without locks, or to servers."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unisono.agreeing import Parts
from unisono.comm.locks import Locks
from unisono.comm.waiting import Waiter
from unisono.engines.asynchronous import AsynchronousEngine
from unisono.engines.meeting import Done
from unisono.engines.replaying import ReplayEngine, RoundsReplayEngine
from unisono.engines.rounds import RoundsEngine
from unisono.plan.assignment import runs
from unisono.plan.lock_free import LockFreePool
from unisono.plan.pool import Pool
from unisono.plan.rounds import RoundsPool
from unisono.plan.unit_pool import Words
from unisono.state.order import write_order, write_rounds
from unisono.sync.commits import Commits
from unisono.sync.damping import DampedRates
from unisono.sync.divided import servers_of
from unisono.sync.hogwild import LockFreeValues
from unisono.sync.policy import Executes
from unisono.sync.pulled import PulledValues
from unisono.sync.server import Servers
from unisono.sync.tables import members
from unisono.sync.turns import Turns
from unisono.sync.updater import Updater

_NONE: Words = np.zeros(0, dtype=np.int64)
"""In place of the rows of tables, where there are none."""


def pushing_engine(parts: Parts, locks: Locks, pulled: PulledValues | None) -> Executes:
    """An engine of workers that reach all that they update.

    Arguments:
        locks: of the pool, and of servers.
        pulled: what this worker computes with, where that is not the state itself.
    """
    pool = parts.pool()
    if isinstance(pool, LockFreePool):
        return _lock_free_engine(parts, locks, pool)
    assert pulled is not None
    return _server_engine(parts, locks, pool, pulled)


def turns_of(
    parts: Parts, pool: Pool | LockFreePool, locks: Locks, waiter: Waiter, counted: Sequence[int] | None = None
) -> Turns:
    """The pool's.

    Arguments:
        waiter: how one waits for slower workers.
        counted: the numbers of those who compute; default: of this host's workers.
    """
    local, place = parts.local, parts.prepared.place

    def living() -> Sequence[int]:
        return [slot for slot in local.members if not local.roll.is_lost(slot)] if counted is None else counted

    return Turns(pool, locks, waiter, parts.pace.bound, living, place.hosts.name)


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
    slot, turns = parts.local.slot, turns_of(parts, pool, locks, parts.local.waiter)
    return AsynchronousEngine(
        parts.local, parts.units(), slot, values, pool, turns, locks, parts.pace, parts.phases, parts.keep
    )


def servers_for(
    parts: Parts,
    worker: int,
    pool: Pool | RoundsPool,
    locks: Locks,
    pulled: PulledValues,
    numbers: Sequence[int] | None = None,
) -> Servers:
    """The servers, as one worker, or one thread of it, updates them.

    Arguments:
        worker: its number in the pool.
        numbers: of those that are prepared; default: all.
    """
    prepared, optimizer, local = parts.prepared, parts.optimizer(), parts.local
    changed = pool.changed if isinstance(pool, Pool) else _NONE
    return Servers(
        worker,
        servers_of(prepared.servers, parts.owner(), optimizer, prepared.tables, changed, numbers),
        pool,
        locks,
        pulled,
        Updater(prepared.layout.flat, optimizer, parts.config.clip),
        DampedRates(optimizer, *parts.rate, parts.config.sync.damping),
        Commits(local.slot, parts.versions, local.header.slot, parts.run_memory, protects=local.survives),
    )


def _server_engine(parts: Parts, locks: Locks, pool: Pool | RoundsPool, pulled: PulledValues) -> Executes:
    config, local, phases, pace, units = parts.config, parts.local, parts.phases, parts.pace, parts.units()
    sync, servers = config.sync, servers_for(parts, parts.local.slot, pool, locks, pulled)
    if sync.replay is not None and isinstance(pool, RoundsPool):
        return RoundsReplayEngine(local, units, servers, pace, Path(sync.replay), phases, parts.keep)
    if sync.replay is not None:
        further = functools.partial(PulledValues, parts.state)
        return ReplayEngine(local, units, pulled, further, servers, pace, Path(sync.replay), phases, parts.keep)
    if isinstance(pool, RoundsPool):
        return RoundsEngine(local, units, servers, pool, locks, pace, phases, parts.keep, recording_rounds(parts))
    turns, write = turns_of(parts, pool, locks, parts.local.waiter), recording(parts)
    return AsynchronousEngine(local, units, local.slot, servers, pool, turns, locks, pace, phases, parts.keep, write)


def _recorded(parts: Parts) -> Path | None:
    """Where the order of pushes goes; None where it is not wanted."""
    run_dir = parts.config.run_dir
    return Path(run_dir) if parts.config.sync.record and run_dir is not None else None


def recording_rounds(
    parts: Parts,
) -> Callable[[int, Sequence[Sequence[int]], Sequence[tuple[float, float]]], None]:
    """Keeps which units counted in each round of a step, where that is wanted."""
    run_dir = _recorded(parts)

    def write(step: int, rounds: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]]) -> None:
        if run_dir is not None:
            write_rounds(run_dir, step, rounds, sums)

    return write


def recording(parts: Parts) -> Callable[[int, Done], None] | None:
    """Keeps the order of a step's pushes, on the first host; None where that is not wanted."""
    run_dir = _recorded(parts)
    if run_dir is None:
        return None

    def write(step: int, done: Done) -> None:
        if done.taken is not None and parts.prepared.place.host == 0:
            write_order(run_dir, step, done.taken.order, done.taken.base, done.taken.sums)

    return write
