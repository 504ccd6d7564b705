"""How the workers of a run agree, put together from what was prepared: a policy of the exact engine, or a parameter
server's engine."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from unisono.asynchronous import AsynchronousEngine
from unisono.comm.group import Group
from unisono.comm.host import HostGroup
from unisono.comm.locks import Locks
from unisono.comm.partial import Partial
from unisono.comm.squares import ArenaSquares
from unisono.comm.versions import ArenaVersions
from unisono.config import TrainingConfig
from unisono.data.feed import TrainingFeed
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.schedules import Schedule, scale
from unisono.parallel.replicated import Replica
from unisono.plan.pool import Entry, Pool
from unisono.plan.rounds import RoundsLayout, RoundsPool
from unisono.preparation import Prepared, pool_layout
from unisono.replaying import ReplayEngine, RoundsReplayEngine
from unisono.rounds import RoundsEngine
from unisono.state.order import write_order, write_rounds
from unisono.state.training_state import TrainingState
from unisono.sync.every_step import EveryStep, GatheredSquares, Rates
from unisono.sync.holdings import Holdings
from unisono.sync.local import LocalSteps, terms_of, turns_of
from unisono.sync.ownership import Owner, RunMemory
from unisono.sync.phases import Phases
from unisono.sync.policy import Executes
from unisono.sync.server import PulledValues, Servers, divided, servers_of
from unisono.sync.updater import Updater
from unisono.units import Pace, UnitGradients


def policy_of(
    prepared: Prepared,
    config: TrainingConfig,
    group: Group,
    local: HostGroup,
    state: TrainingState,
    run_memory: Callable[[int], RunMemory],
    versions: memoryview,
    schedule: Schedule,
    replica: int,
) -> EveryStep:
    """How the workers agree, and what this one updates.

    Arguments:
        run_memory: of a slot.
        replica: the number of the state that this worker updates a part of.
    """
    layout = prepared.layout
    optimizer = BlockOptimizer(prepared.optimizer, prepared.update, state.python_state())
    joinable = state.memory.device.type != "cpu" or config.threads == 1
    owner = Owner(state, run_memory(local.slot), prepared.originals, prepared.teams, joinable)
    row, protects = local.header.slot, local.survives
    holdings = Holdings(local.slot, prepared.owned, owner, optimizer, versions, row, run_memory, protects=protects)
    holdings.adopt(local.members)
    exact = (
        group,
        layout.flat,
        prepared.teams,
        config.micro_batches,
        GatheredSquares(group) if prepared.shards is not None else ArenaSquares(local, replica),
        state.span,
        holdings,
        optimizer,
        Rates(schedule, scale(config.scaling, config.global_batch_size), config.clip),
    )
    if not config.sync.relaxed:
        return EveryStep(*exact)
    return LocalSteps(
        terms_of(config), turns_of(layout.flat, config.sync), owner, ArenaVersions(local, versions), *exact
    )


def server_engine(
    prepared: Prepared,
    config: TrainingConfig,
    local: HostGroup,
    state: TrainingState,
    snapshot: TrainingState,
    run_memory: Callable[[int], RunMemory],
    versions: memoryview,
    schedule: Schedule,
    replica: Replica,
    feed: TrainingFeed,
    values: PulledValues,
    locks: Locks,
    phases: Phases,
) -> Executes:
    """An engine of workers that wait for nobody; every worker may update everything."""
    layout, sync = prepared.layout, config.sync
    optimizer = BlockOptimizer(prepared.optimizer, prepared.update, state.python_state())
    joinable = config.threads == 1
    owner = Owner(state, run_memory(local.slot), prepared.originals, prepared.teams, joinable)
    clip = config.clip.norm if config.clip is not None else None
    divides = pool_layout(layout, prepared.update, config, prepared.host.slots, prepared.run_elements)
    words = local.arena.bytes(prepared.host.regions.named["pool"])
    pool = RoundsPool(divides, words) if isinstance(divides, RoundsLayout) else Pool(divides, words)
    servers = Servers(
        local.slot,
        servers_of(divided(layout, prepared.update, sync.servers, prepared.run_elements), owner, optimizer),
        pool if isinstance(pool, Pool) else None,
        locks,
        values,
        Updater(layout.flat, optimizer, config.clip),
        optimizer,
        (schedule, scale(config.scaling, config.global_batch_size)),
        sync.damping,
        versions,
        local.header.slot,
        run_memory,
        protects=local.survives,
    )
    size_bytes, flat = prepared.partials.size_bytes, layout.flat

    def memory() -> Partial:
        return Partial(prepared.partials, torch.zeros(size_bytes, dtype=torch.uint8))

    units = UnitGradients(replica, feed, sync.push, flat, prepared.teams, memory)
    pace = Pace(sync.push, sync.staleness, clip)

    def keep() -> None:
        snapshot.memory.copy_(state.memory)

    run_dir = Path(config.run_dir) if sync.record and config.run_dir is not None else None
    if isinstance(pool, RoundsPool) and sync.replay is not None:
        return RoundsReplayEngine(local, units, servers, pace, Path(sync.replay), phases, keep)
    if isinstance(pool, RoundsPool):

        def record_rounds(step: int, rounds: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]]) -> None:
            if run_dir is not None:
                write_rounds(run_dir, step, rounds, sums)

        return RoundsEngine(local, units, servers, pool, locks, pace, phases, keep, record_rounds)
    if sync.replay is not None:
        further = functools.partial(PulledValues, state)
        return ReplayEngine(local, units, values, further, servers, pace, Path(sync.replay), phases, keep)

    def record(step: int, order: Sequence[Sequence[Entry]], base: Sequence[int], sums: NDArray[np.float64]) -> None:
        if run_dir is not None:
            write_order(run_dir, step, order, base, sums)

    return AsynchronousEngine(local, units, servers, pool, locks, pace, phases, keep, record)
