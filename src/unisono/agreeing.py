"""How the workers of a run agree, put together from what was prepared: a policy of the exact engine, or an engine whose
workers meet between steps of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.numbers import ArenaNumbers
from unisono.comm.partial import Partial
from unisono.comm.passage import Passages
from unisono.comm.versions import ArenaVersions
from unisono.config import TrainingConfig
from unisono.data.feed import TrainingFeed
from unisono.engines.pipedream import PipeDreamEngine
from unisono.engines.second_order import CommonValues, NewtonEngine
from unisono.engines.units import Pace, UnitGradients
from unisono.in_flight import InFlight
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.kfac import KFAC
from unisono.optim.newton import NewtonCG
from unisono.optim.numbers import Numbers
from unisono.optim.schedules import Schedule, scale
from unisono.optim.state_spec import clone
from unisono.parallel.replicated import Replica
from unisono.parallel.stash import Stash
from unisono.plan.assignment import apart_teams, runs
from unisono.plan.lock_free import LockFreeLayout, LockFreePool
from unisono.plan.pool import Pool, PoolLayout
from unisono.plan.rounds import RoundsLayout, RoundsPool
from unisono.plan.schedule import timetable
from unisono.plan.stash import StepWords
from unisono.preparation import Prepared, pool_layout
from unisono.run.clients import Federation
from unisono.state.training_state import TrainingState
from unisono.sync.commits import Commits
from unisono.sync.curvature import CurvedSteps
from unisono.sync.every_step import EveryStep, GatheredSquares, Rates
from unisono.sync.holdings import Holdings
from unisono.sync.local import LocalSteps, telling_of, terms_of, turns_of
from unisono.sync.ownership import OwnedRun, Owner, RunMemory
from unisono.sync.phases import Phases
from unisono.sync.policy import Executes
from unisono.sync.pulled import PulledValues
from unisono.sync.stash import StashedValues, own_team
from unisono.sync.updater import Updater


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
    federation: Federation | None,
) -> EveryStep:
    """How the workers agree, and what this one updates.

    Arguments:
        run_memory: of a slot.
        replica: the number of the state that this worker updates a part of.
        federation: the clients that take turns as replicas.
    """
    layout = prepared.layout
    optimizer = BlockOptimizer(prepared.optimizer, prepared.update, state.python_state())
    joinable = state.memory.device.type != "cpu" or config.threads == 1
    owner = Owner(state, run_memory(local.slot), prepared.originals, prepared.teams, joinable)
    commits = Commits(local.slot, versions, local.header.slot, run_memory, protects=local.survives)
    holdings = Holdings(prepared.owned, owner, optimizer, commits)
    holdings.adopt(local.members)
    shards, hosts = prepared.shards, len(prepared.place.hosts.sizes)
    kept = None if shards is None else shards.blocks(prepared.place.host)
    divided_apart = config.sync.apart and shards is not None
    exact = (
        group,
        layout.flat,
        apart_teams(layout.flat, len(layout.buffers)) if divided_apart else prepared.teams,
        config.micro_batches,
        GatheredSquares(group)
        if config.layout.zero and hosts > 1
        else ArenaNumbers(local, local.layout.numbers("squares", replica), "norms", kept),
        state.span,
        holdings,
        optimizer,
        Rates(schedule, scale(config.scaling, config.global_batch_size), config.clip),
    )
    if isinstance(prepared.optimizer, KFAC):
        changes = ArenaNumbers(local, local.layout.numbers("changes", replica), "directions")
        return CurvedSteps(prepared.optimizer, state, ArenaVersions(local, versions, "curvature"), changes, *exact)
    if not config.sync.relaxed:
        return EveryStep(*exact)
    blocks = range(len(layout.flat.blocks))
    here = [True] * layout.flat.replicas
    if shards is not None:
        here = [shards.of_block[first] == prepared.place.host for first, _ in layout.flat.column(0, 0)[1:]]
    return LocalSteps(
        terms_of(config, federation),
        telling_of(config, here, group.start_gather if isinstance(group, HierarchicalGroup) else None),
        turns_of(layout.flat, config.sync),
        owner,
        ArenaVersions(local, versions, "updates of replicas"),
        blocks if kept is None else kept,
        *exact,
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of whose workers meet between steps.

    Attributes:
        snapshot: where a checkpoint is written from.
        run_memory: of a slot.
        versions: of blocks.
    """

    prepared: Prepared
    config: TrainingConfig
    local: HostGroup
    state: TrainingState
    snapshot: TrainingState
    run_memory: Callable[[int], RunMemory]
    versions: memoryview
    schedule: Schedule
    replica: Replica
    feed: TrainingFeed
    phases: Phases

    @property
    def rate(self) -> tuple[Schedule, float]:
        """The schedule, and the factor of the batch size."""
        return self.schedule, scale(self.config.scaling, self.config.global_batch_size)

    @property
    def pace(self) -> Pace:
        """How workers proceed."""
        sync, clip = self.config.sync, self.config.clip
        return Pace(sync.push, sync.staleness, clip.norm if clip is not None else None)

    def keep(self) -> None:
        """Copy the state to where a checkpoint is written from."""
        self.snapshot.memory.copy_(self.state.memory)

    def optimizer(self) -> BlockOptimizer:
        """Updates every part of the state."""
        return BlockOptimizer(self.prepared.optimizer, self.prepared.update, self.state.python_state())

    def owner(self) -> Owner:
        """Of every part of the state: each worker may update everything."""
        memory, joinable = self.run_memory(self.local.slot), self.config.threads == 1
        return Owner(self.state, memory, self.prepared.originals, self.prepared.teams, joinable)

    def units(self) -> UnitGradients:
        """Computes gradients."""
        rows = [use for table in self.prepared.tables for use in table.uses]
        push, teams = self.config.sync.push, self.prepared.teams
        return UnitGradients(self.replica, self.feed, push, self.prepared.layout.flat, teams, self.partial, rows)

    def partial(self) -> Partial:
        """Memory of this process for sums."""
        partials = self.prepared.partials
        return Partial(partials, torch.zeros(partials.size_bytes, dtype=torch.uint8))

    def pool(self) -> LockFreePool | Pool | RoundsPool:
        """The step's units."""
        divides, words = self._pool_layout, self.local.arena.bytes(self.prepared.host.regions.named["pool"])
        if isinstance(divides, RoundsLayout):
            return RoundsPool(divides, words)
        return Pool(divides, words) if isinstance(divides, PoolLayout) else LockFreePool(divides, words)

    def claims(self) -> RoundsPool:
        """The units of a step done in rounds, for workers of several hosts: which of them count."""
        divides = self._pool_layout
        assert isinstance(divides, RoundsLayout)
        return RoundsPool(divides, self.local.arena.bytes(self.prepared.host.regions.named["claims"]))

    @property
    def _pool_layout(self) -> LockFreeLayout | PoolLayout | RoundsLayout:
        prepared = self.prepared
        return pool_layout(prepared.layout.flat, self.config, prepared.place, prepared.servers, prepared.tables)


def stashing_engine(
    parts: Parts,
    states: Sequence[TrainingState],
    stash: Stash,
    buffers: Sequence[Tensor],
    passages: Passages | None,
) -> Executes:
    """An engine of a pipeline that does not drain.

    Arguments:
        states: where versions lie; the first is the training state.
        buffers: this worker's own.
        passages: to the other stages.
    """
    prepared, config, optimizer, local = parts.prepared, parts.config, parts.optimizer(), parts.local
    stashing, flat = prepared.stashing, prepared.layout.flat
    assert stashing is not None
    mine, stages = local.slot, config.layout.pipeline
    teams = own_team(prepared.teams, mine)
    blocks = [block for block, team in enumerate(teams.of_blocks(flat)) if team == 0]
    joinable = config.threads == 1

    def prepare(state: TrainingState, own: Sequence[int]) -> list[OwnedRun]:
        owner = Owner(state, parts.run_memory(mine), prepared.originals, teams, joinable)
        return owner.prepare(runs(flat, prepared.update, own, prepared.run_elements), optimizer)

    values = StashedValues(
        stashing,
        states,
        blocks,
        prepare,
        teams,
        Updater(flat, optimizer, config.clip),
        optimizer,
        parts.rate,
        [
            (own, common, not team)
            for own, common, team in zip(buffers, parts.state.buffers, teams.buffers, strict=True)
        ],
    )
    return PipeDreamEngine(
        local,
        stashing,
        timetable("1f1b", stages, range(config.micro_batches)).workers[mine],
        parts.replica,
        stash,
        InFlight(parts.replica, parts.feed, parts.phases, passages),
        values,
        StepWords(local.arena.bytes(prepared.host.regions.named["pool"]), stashing.units),
        parts.partial,
        parts.phases,
        parts.keep,
        passages,
        last=mine == stages - 1,
    )


def newton_engine(parts: Parts, bound: Sequence[nn.Parameter], pulled: PulledValues) -> Executes:
    """An engine of an optimizer that evaluates the loss several times in a step.

    Arguments:
        bound: this worker's own parameters.
        pulled: their values.
    """
    prepared, state = parts.prepared, parts.state
    flat, constructed, numbers = prepared.layout.flat, prepared.optimizer, state.python_state()
    assert isinstance(constructed, NewtonCG) and numbers is not None
    groups: list[list[nn.Parameter]] = [[] for _ in constructed.param_groups]
    for parameter, (_, place) in zip(bound, flat.uses, strict=True):
        group = flat.parameters[place].group
        assert group is not None
        groups[group].append(parameter)
    optimizer = clone(constructed, groups)
    assert isinstance(optimizer, NewtonCG)
    values = CommonValues(pulled, Numbers(constructed, numbers), parts.versions)
    count = parts.config.micro_batches
    return NewtonEngine(parts.local, optimizer, parts.replica, parts.feed, values, count, parts.phases, parts.keep)
