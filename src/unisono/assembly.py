"""One worker put together: from what was prepared to an engine over shared memory."""

import functools
import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unisono.agreeing import Parts, newton_engine, policy_of, stashing_engine
from unisono.comm.arena import DeviceMemory, Region, mapped
from unisono.comm.copies import Copies
from unisono.comm.group import Group
from unisono.comm.hierarchical import Continuity, HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.locks import Locks
from unisono.comm.memos import Memos
from unisono.comm.offload import Offload
from unisono.comm.passage import Passages, clear_lane
from unisono.computing import chosen_here, divided_partials, replica_over, sharded_values, tensor_parallel
from unisono.config import TrainingConfig
from unisono.data.feed import Feed, TrainingFeed
from unisono.engine import Engine, WorkShare, lone_share, rounds_share, work_share
from unisono.errors import ConfigurationError, Regrouped
from unisono.evaluation import Evaluator
from unisono.events import Emitter
from unisono.filling import Load, Restored, fill
from unisono.footprint import machine_bytes, refuse_what_cannot_fit
from unisono.launch.membership import join_hosts, place_of
from unisono.launch.world import World
from unisono.optim.newton import NewtonCG
from unisono.optim.schedules import Schedule
from unisono.parallel.bind import bind, unbind
from unisono.parallel.replicated import Replica
from unisono.parallel.stash import Stash
from unisono.plan.assignment import UpdateClass, micro_batches
from unisono.plan.hosts import Hosts
from unisono.plan.roster import Lot
from unisono.plan.schedule import WHOLE, timetable
from unisono.plan.shards import apart_shares
from unisono.preparation import Objects, Prepared, crews_of, prepare
from unisono.protection import protected, snapshots_of
from unisono.pushing import pushing_engine
from unisono.run.clients import ClientSampler
from unisono.run.sampling import Sampler
from unisono.spreading import Connections, spread_engine
from unisono.state.shared import SharedState
from unisono.state.snapshots import Snapshots
from unisono.state.training_state import TrainingState
from unisono.sync.local import federation_of
from unisono.sync.ownership import RunMemory
from unisono.sync.phases import Phases
from unisono.sync.policy import Executes
from unisono.sync.pulled import PulledValues

PATIENCE, PATIENCE_S = 3, 10.0
"""Times the deadline, and seconds besides, that a worker waits where the launcher sees to those who hang."""


@dataclass(slots=True)
class Worker:
    """A worker ready to train.

    Attributes:
        snapshots: copies of the state that outlive this worker; None where the state does, or nothing is survived.
        shared: the state, where hosts share it and this is the first worker of one.
        offload: what of it lies on a disk.
        unprotected: why a lost worker ends the run, where that should not be so.
        entered: what the others have said as this worker joined them, over several hosts.
        memos: where it leaves what others may have to tell for it; None where none would be left.
        locks: of what workers take and update in turn; None where they do not.
        connections: to other workers' parts of one.
    """

    prepared: Prepared
    group: Group
    state: TrainingState
    snapshot: TrainingState
    replica: Replica
    engine: Executes
    evaluator: Evaluator | None
    snapshots: Snapshots | None
    shared: SharedState | None = None
    offload: Offload | None = None
    memos: Memos | None = None
    locks: Locks | None = None
    connections: Connections | None = None
    unprotected: str = ""
    entered: Regrouped | None = None
    released: bool = False

    def release(self, cause: BaseException | None = None) -> None:
        """Give the model memory of its own, and leave the group; once."""
        if not self.released:
            self.released = True
            try:
                if cause is None and self.prepared.copies:
                    self.replica.bring_all()
            except BaseException as error:
                cause = error
                raise
            finally:
                with ExitStack() as then:  # from the last to the first, whichever of them fails
                    then.callback(self._free_model)
                    if self.locks is not None:
                        then.callback(self.locks.close)
                    if self.connections is not None:
                        then.callback(self.connections.close, cause)
                    if self.snapshots is not None:
                        then.callback(self.snapshots.close)
                    then.callback(self.group.close, cause)
            unbind(self.prepared.model, self.prepared.layout.flat, copies=self.prepared.copies)

    def _free_model(self) -> None:
        """Let go of what is wrapped around the model."""
        self.replica.buffers.invalidate()
        self.replica.buffers.reset()
        self.replica.close()


def assemble(
    objects: Objects,
    config: TrainingConfig,
    world: World,
    device: torch.device,
    schedule: Schedule,
    listeners: Emitter | None,
    restore: Callable[[Prepared, Load], Restored],
    stopping: Callable[[], bool],
    *,
    trains: bool = True,
) -> tuple[Worker, int]:
    """Share memory with the other workers, fill it, and build the engine.

    Arguments:
        trains: the state changes, and is lost with whoever has it alone.
        stopping: whether this worker was asked to stop.
        restore: called by rank 0 once the state holds its initial values; may load a checkpoint.

    Returns the worker and the step from which training starts.
    """
    place = place_of(world, device)
    several = len(place.hosts.sizes) > 1
    feed = Feed(objects.data, config.seed, "training", objects.collate, device)
    prepared = prepare(objects, config, place, feed)
    room_bytes = refuse_what_cannot_fit(prepared, config, machine_bytes())
    host, mesh = prepared.host, prepared.mesh
    protection = protected(prepared, config, world, room_bytes, trains=trains)
    rules = protection.rules
    alone = host.slots == 1 and rules is None
    own = several and device.type != "cpu"
    descriptor = world.arena(host.size_bytes, own=own, alone=alone, rules=rules)
    to_lock = os.dup(descriptor) if descriptor is not None and config.sync.pushes else None
    arena = mapped(descriptor, host.size_bytes)
    memory = DeviceMemory(device) if device.type != "cpu" else lambda region: arena.tensor(region, torch.uint8)
    local = HostGroup(
        arena,
        host,
        prepared.partials,
        place.local_rank,
        range(host.slots) if several else world.present,
        1,
        PATIENCE * config.deadline_s + PATIENCE_S if protection.rules is not None else config.deadline_s,
        memory=memory,
        names=place.local_name,
        teams=crews_of(mesh),
        across_s=config.deadline_s if world.spans and protection.goes_on else None,  # then they go on with others
    )
    local.survives = protection.goes_on
    local.waits_for_all = protection.goes_on and config.fault.on_loss == "wait"
    made = _fingerprint(prepared, config, feed.size)
    locks = Locks(to_lock, local.waiter) if config.sync.pushes else None
    with ExitStack() as failing:
        if locks is not None:
            failing.callback(locks.close)
        if several or not world.joins:
            local.assemble(made)
        group: HostGroup | HierarchicalGroup = local
        if several:
            group = join_hosts(
                prepared.layout,
                config,
                local,
                place,
                world,
                device,
                feed.size,
                prepared.teams,
                prepared.shards if config.layout.zero else None,
                survives=protection.goes_on,
            )
        failing.push(lambda kind, error, trace: group.close(error))
        starts_again = protection.starts_again
        if world.spans and not protection.goes_on and isinstance(group, HierarchicalGroup):  # some may lack the memory
            starts_again = all(group.all_gather(b"yes" if starts_again else b"", "snapshots of all hosts"))
        worker, step = _worker(
            objects,
            config,
            prepared,
            group,
            local,
            memory,
            feed,
            schedule,
            listeners,
            None if world.joins else restore,
            stopping,
            world,
            locks,
            starts_again=starts_again,
        )
        worker.unprotected = protection.missing
        if world.joins and isinstance(group, HierarchicalGroup):
            worker.entered = group.enter_run()
            group.begin_work()
            step = worker.entered.step
        elif world.joins:
            step = local.join(made, lambda: _take_state(prepared, local, worker.state, memory))
        failing.pop_all()
    return worker, step


def _worker(
    objects: Objects,
    config: TrainingConfig,
    prepared: Prepared,
    group: HostGroup | HierarchicalGroup,
    local: HostGroup,
    memory: Callable[[Region], Tensor],
    feed: Feed,
    schedule: Schedule,
    listeners: Emitter | None,
    restore: Callable[[Prepared, Load], Restored] | None,
    stopping: Callable[[], bool],
    world: World,
    locks: Locks | None,
    *,
    starts_again: bool,
) -> tuple[Worker, int]:
    """A worker over its group, and the step from which it starts.

    Arguments:
        locks: of what workers take and update in turn; None where they do not.
        restore: as of `assemble`; None where the state is there already.
        starts_again: there are snapshots.
    """
    host, device = prepared.host, feed.device
    mine = prepared.mesh.coordinates(local.slot)["data"] if host.replicas > 1 else 0
    offload = _offload(prepared, config, local)
    state = TrainingState(prepared.layout, memory(host.state(mine)))
    snapshot = TrainingState(prepared.layout, memory(host.snapshot()), frozen=state)
    versions = local.arena.words(host.versions(mine))
    by_name = config.init == "by_name"
    bound = bind(prepared.model, prepared.layout.flat, state.values) if by_name else None
    shared = _shared(prepared, config, group, local, state)
    snapshots = snapshots_of(prepared, config, group, local, state, world) if starts_again else None
    step = 0
    if restore is not None:
        step = fill(
            prepared, config, group, local, state, shared, memory, versions, restore, snapshots, world.rolled_back
        )
    newton = isinstance(prepared.optimizer, NewtonCG)
    pulled = PulledValues(state) if newton or config.sync.mode == "server" else None
    bound = bound or bind(prepared.model, prepared.layout.flat, state.values if pulled is None else pulled.values)
    recompute = chosen_here(prepared, objects, config, feed)
    sharded = sharded_values(prepared, objects, config, group, local, state, feed)
    tensor = tensor_parallel(prepared, local, loss_parallel=config.layout.loss_parallel)
    buffers = state.buffers if pulled is None else pulled.buffers
    states, stash = [state], None
    if prepared.stashing is not None:
        states += [state.apart() for _ in range(1, prepared.stashing.versions)]
        places = [each.values for each in states]
        stash = Stash(prepared.model, prepared.layout.flat, prepared.stashing, bound, places)
        buffers = [buffer.clone() for buffer in state.buffers]
    replica = replica_over(prepared, objects, config, buffers, bound, feed, recompute, tensor, sharded, stash)

    def run_memory(slot: int) -> RunMemory:
        return RunMemory(prepared.layout, state.memory, memory(host.undo(slot)), snapshot.memory)

    share, passages = _share(prepared, config, group, local)
    order = (config.seed, config.global_batch_size, config.micro_batch_size)
    federation = federation_of(config, objects.data)
    sampler = Sampler(feed.size, *order) if federation is None else ClientSampler(feed.size, *order, federation)
    names = [name for name, _ in prepared.layout.flat.uses] + [spec.name for spec in prepared.layout.buffers]
    exact = group is local and passages is None and tensor is None and stash is None and not newton
    if exact and _copies_pay(config, host.slots):
        local.copies = Copies(local, host.entries, names)
    training = TrainingFeed(feed, sampler)
    if group is local:
        local.roll.costs = training.costs
    evaluator = None
    if objects.validation is not None:
        held_out = Feed(objects.validation, config.seed, "validation", objects.collate, device)
        evaluator = Evaluator(
            group, replica, held_out, config.micro_batch_size, config.validation.samples, objects.metrics, stopping
        )
    memos = Memos(local.arena.bytes(host.memos()), local.slot) if local.survives else None
    if isinstance(group, HierarchicalGroup):
        group.continuity = Continuity(state.parts, versions)
    engine: Executes
    connections = None
    phases = Phases(group, listeners)
    own = state, snapshot, run_memory, versions
    parts = Parts(prepared, config, local, *own, schedule, replica, training, phases)
    if locks is not None and pulled is not None and prepared.homes(config).spread:
        engine, connections = spread_engine(parts, group, world.address, locks, pulled)
    elif locks is not None:
        engine = pushing_engine(parts, locks, pulled)
    elif newton and pulled is not None:
        engine = newton_engine(parts, bound, pulled)
    elif stash is not None:
        engine = stashing_engine(parts, states, stash, buffers, passages)
    else:
        engine = Engine(
            group,
            replica,
            training,
            policy_of(prepared, config, group, local, state, run_memory, versions, schedule, mine, federation),
            config.micro_batches,
            share,
            phases,
            names,
            group.partial if tensor is None else divided_partials(prepared, local, tensor),
            passages,
            local.copies,
        )
    members = (prepared, group, state, snapshot, replica, engine, evaluator, snapshots, shared, offload, memos)
    return Worker(*members, locks=locks, connections=connections), step


def _copies_pay(config: TrainingConfig, workers: int) -> bool:
    """Whether workers that idle compute what others are late with: not where they would take those their cores."""
    if config.fault.copies == "auto":
        return 1 < workers * config.threads <= len(os.sched_getaffinity(0))
    return config.fault.copies == "always"


def _offload(prepared: Prepared, config: TrainingConfig, local: HostGroup) -> Offload | None:
    """The optimizer's state in a file, where that is wanted."""
    if config.layout.offload is None:
        return None
    if prepared.update is not UpdateClass.ELEMENT:
        raise ConfigurationError(
            f"layout.offload is for optimizers that update element by element, and {type(prepared.optimizer).__name__} "
            f"is {prepared.update}; leave it out"
        )
    states = [prepared.host.state(replica) for replica in range(prepared.host.replicas)]
    named = prepared.layout.regions.named.items()
    kept = [region for name, region in named if name.startswith("state ") and region.size_bytes]
    regions = [state.part(region.offset, region.size_bytes) for state in states for region in kept]
    return Offload(local, Path(config.layout.offload), regions)


def _shared(
    prepared: Prepared,
    config: TrainingConfig,
    group: HostGroup | HierarchicalGroup,
    local: HostGroup,
    state: TrainingState,
) -> SharedState | None:
    """The state that hosts share, on the first worker of each."""
    if prepared.shards is None or local.rank > 0 or not isinstance(group, HierarchicalGroup):
        return None
    region, arena = prepared.host.state(0), local.arena

    def release(part: Region) -> None:
        arena.release(region.part(part.offset, part.size_bytes))

    return SharedState(state, prepared.shards, group, release, values_everywhere=not prepared.shards.values)


def _share(
    prepared: Prepared, config: TrainingConfig, group: HostGroup | HierarchicalGroup, local: HostGroup
) -> tuple[Callable[[], WorkShare], Passages | None]:
    """What this worker does in the step that has begun, and its ways to the other stages of its replica."""
    layout, count = config.layout, config.micro_batches
    at, passages = prepared.mesh.coordinates(local.slot), None
    if prepared.passages is not None:
        lanes = prepared.passages
        passages = Passages(local, lanes, at["data"] * layout.tensor + at["tensor"])
        local.roll.regained = lambda replica: clear_lane(local, lanes, replica)

    def together(own: range) -> WorkShare:
        table = timetable(layout.schedule, layout.pipeline, own, layout.virtual_stages)
        return work_share(own, count, table.workers[at["pipeline"]])

    @functools.lru_cache(maxsize=1)  # the hosts rarely change
    def share_at(rank: int, hosts: Hosts) -> WorkShare:
        size = hosts.size
        if config.sync.replicas is not None:
            return together(apart_shares(count, config.sync.replicas, hosts.sizes)[rank])
        if prepared.shards is not None and prepared.shards.rounds:
            own = range(rank, prepared.shards.rounds * size, size)
            return rounds_share(own, timetable("1f1b", 1, own).workers[0])
        return together(micro_batches(count, size // layout.model_workers)[rank // layout.model_workers])

    if isinstance(group, HierarchicalGroup):

        def share_of_step() -> WorkShare:
            rest = group.rest()
            return share_at(group.rank, group.place.hosts) if rest is None else lone_share(rest[0], count, 0, rest[1])

        return share_of_step, passages

    @functools.lru_cache(maxsize=1)  # of one membership, which rarely changes
    def share_of(lot: Lot) -> WorkShare:
        if passages is not None and len(lot.holders) < layout.model_workers:
            return lone_share(lot.micro_batches, count, WHOLE, 0)
        if not lot.micro_batches:
            return WorkShare((), {})
        return together(range(lot.micro_batches[0], lot.micro_batches[-1] + 1))

    return lambda: share_of(local.lot()), passages


def _take_state(prepared: Prepared, local: HostGroup, state: TrainingState, memory: Callable[[Region], Tensor]) -> None:
    """For a worker that joins, where every replica has a state of its own: that of another one."""
    if prepared.host.replicas == 1:
        return
    done = local.roll.step
    other = next(s for s in local.members if s != local.slot and local.header.done(s) >= done)
    mine, theirs = (prepared.mesh.coordinates(slot)["data"] for slot in (local.slot, other))
    state.memory.copy_(memory(prepared.host.state(theirs)))
    versions = (local.arena.words(prepared.host.versions(replica)) for replica in (mine, theirs))
    target, source = versions
    target[:] = source


def _fingerprint(prepared: Prepared, config: TrainingConfig, samples: int) -> int:
    """A hash of what all workers must agree on, never 0."""
    agreed = (
        prepared.layout,
        prepared.host,
        prepared.tensor,
        samples,
        config.model_dump(exclude={"run_dir", "observe"}),
    )
    return int.from_bytes(hashlib.sha256(repr(agreed).encode()).digest()[:8], "little") | 1
