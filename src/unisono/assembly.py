"""One worker put together: from the user's objects and the configuration to an engine over shared memory."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.comm.arena import Arena, DeviceMemory, Region
from unisono.comm.group import Group
from unisono.comm.host import HostGroup
from unisono.comm.host_layout import HostLayout, host_layout
from unisono.comm.journal import Journal
from unisono.comm.partial import PartialLayout, partial_layout
from unisono.comm.passage import Passages
from unisono.comm.passage_layout import LINE_BYTES, PassageLayout
from unisono.config import TrainingConfig
from unisono.data.feed import Collate, Dataset, Feed, TrainingFeed
from unisono.engine import Engine, WorkShare, work_share
from unisono.errors import CheckpointError, ConfigurationError, UnisonoError
from unisono.evaluation import Evaluator, Metrics
from unisono.events import Emitter
from unisono.launch.membership import join_hosts, place_of, way
from unisono.launch.world import World
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.classes import pin_variant, update_class
from unisono.optim.eager import without_compiler
from unisono.optim.schedules import Schedule, scale
from unisono.optim.state_spec import state_spec
from unisono.parallel.bind import ModelTensors, bind, model_tensors, unbind
from unisono.parallel.buffers import Buffers
from unisono.parallel.recompute import Recomputation, blocks
from unisono.parallel.replicated import Loss, Replica, call, split
from unisono.parallel.stages import Stages
from unisono.plan.assignment import Run, Teams, UpdateClass, micro_batches, one_team, owners, runs
from unisono.plan.blocks import aligned, flat_layout
from unisono.plan.hosts import Place
from unisono.plan.mesh import Mesh
from unisono.plan.outline import Cut, outline
from unisono.plan.partition import Division, divide
from unisono.plan.schedule import placement, timetable
from unisono.run.rng import Isolation, ModuleRandom, derive
from unisono.run.sampling import Sampler
from unisono.state.layout import StateLayout, state_layout
from unisono.state.training_state import TrainingState
from unisono.sync.every_step import EveryStep, Rates
from unisono.sync.ownership import OwnedBuffers, Owner, RunMemory, undo_bytes
from unisono.sync.phases import Phases

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True)
class Objects:
    """What only the user's code can give.

    Attributes:
        model, loss, data, optimizer, validation, metrics, collate: see `Trainer`.
        definition: facts to record with the run, a digest of the data for example.
        summary: the trained model -> what to show at the end.
        tokens_per_sample: for throughput in tokens, where samples hold them.
    """

    model: Callable[[], nn.Module]
    loss: Loss
    data: Dataset
    optimizer: OptimizerFactory
    validation: Dataset | None
    metrics: Metrics | None
    collate: Collate | None
    definition: Callable[[], Mapping[str, Any]] | None = None
    summary: Callable[[nn.Module], Mapping[str, Any]] | None = None
    tokens_per_sample: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model and an optimizer, and all that follows from them and the configuration, before memory is shared.

    Attributes:
        owned: the runs that each worker of this host updates.
        mesh: of this host's workers.
        division, passages: of the model into stages, and the memory between them; None where there is one stage.
    """

    model: nn.Module
    tensors: ModelTensors
    optimizer: Optimizer
    originals: Sequence[nn.Parameter]
    update: UpdateClass
    layout: StateLayout
    partials: PartialLayout
    owned: tuple[tuple[Run, ...], ...]
    host: HostLayout
    mesh: Mesh
    teams: Teams
    division: Division | None
    passages: PassageLayout | None


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint gave besides the state: the step it is at, and the memory of compression."""

    step: int = 0
    compression: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Worker:
    """A worker ready to train."""

    prepared: Prepared
    group: Group
    state: TrainingState
    snapshot: TrainingState
    replica: Replica
    engine: Engine
    evaluator: Evaluator | None
    released: bool = False

    def release(self, cause: BaseException | None = None) -> None:
        """Give the model memory of its own, and leave the group; once."""
        if not self.released:
            self.released = True
            self.group.close(cause)
            self.replica.buffers.invalidate()
            self.replica.buffers.reset()
            self.replica.close()
            unbind(self.prepared.model, self.prepared.layout.flat)


def prepare(objects: Objects, config: TrainingConfig, place: Place, feed: Feed) -> Prepared:
    """Build the model and lay everything out; the same in every worker of a host.

    Raises:
        ConfigurationError: where the objects cannot be trained.
    """
    workers, several_hosts = place.hosts.sizes[place.host], len(place.hosts.sizes) > 1
    with Isolation() as random:
        random.seed(derive(config.seed, "init"))
        model = objects.model()
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"the model's factory returned {type(model).__name__}; return a torch.nn.Module")
    model.to(feed.device)
    tensors = model_tensors(model)
    with without_compiler():
        optimizer = objects.optimizer([p for p, _ in tensors.parameters])
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"the optimizer's factory returned {type(optimizer).__name__}; return a torch.optim.Optimizer"
        )
    if config.wire.momentum and any(group.get("momentum") for group in optimizer.param_groups):
        raise ConfigurationError(
            f"wire.momentum is {config.wire.momentum} and the optimizer has momentum of its own, which would count "
            "twice; set the optimizer's to 0"
        )
    update = update_class(optimizer)
    pin_variant(optimizer)
    specs = tensors.parameter_specs(optimizer)
    flat = flat_layout(specs)
    by_name = {uses[0]: p for p, uses in tensors.parameters}
    originals = [by_name[spec.tensor.name] for spec in flat.parameters]
    layout = state_layout(flat, state_spec(optimizer, update, flat, originals), tensors.buffer_specs())
    partials = partial_layout(flat, tensors.buffer_specs())
    mesh = Mesh(data=workers // config.layout.model_workers, pipeline=config.layout.pipeline)
    division = _division(model, objects.loss, config, feed) if config.layout.stages > 1 else None
    teams = _teams(layout, config, division)
    replicas = mesh.data if config.layout.zero == 0 else 1
    shares = owners(flat, update, mesh.data // replicas, teams) * replicas
    owned = tuple(runs(flat, update, share) for share in shares)
    passages = None
    if division is not None:
        first = sum(place.hosts.sizes[: place.host]) // config.layout.model_workers
        each = micro_batches(config.micro_batches, place.hosts.size // config.layout.model_workers)
        counts = tuple(len(share) for share in each[first : first + mesh.data])
        passages = PassageLayout(counts, tuple(_message_bytes(cut) for cut in division.cuts))
    host = host_layout(
        slots=workers,
        blocks=layout.blocks,
        entries=2 * max(1, (config.micro_batches - 1).bit_length()) + 2,
        partial_bytes=partials.size_bytes,
        state_bytes=layout.size_bytes,
        replicas=replicas,
        undo_bytes=undo_bytes(layout, [run for share in owned for run in share]),
        buckets=len(way(config).buckets(flat)) if several_hosts else 0,
        wire_bytes=way(config).wire_bytes(flat) if several_hosts else 0,
        passages=passages,
    )
    return Prepared(
        model, tensors, optimizer, originals, update, layout, partials, owned, host, mesh, teams, division, passages
    )


def _division(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> Division:
    """Cut the model into stages, after a rehearsal on the first micro-batch."""
    inputs, target = split(feed.load(list(range(min(config.micro_batch_size, feed.size))), 0, "rehearsal"))

    def forward() -> object:
        with torch.autocast(feed.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            return loss(call(model, inputs), target)

    return divide(outline(model, forward), config.layout.stages, config.layout.cuts)


def _teams(layout: StateLayout, config: TrainingConfig, division: Division | None) -> Teams:
    """Which worker of a pipeline computes with what."""
    flat = layout.flat
    if division is None:
        return one_team(flat, len(layout.buffers))
    places = placement(config.layout.schedule, config.layout.pipeline, config.layout.virtual_stages)
    return Teams(
        config.layout.pipeline,
        tuple(places[division.stage_of(name)] for name, _ in flat.uses),
        tuple(places[division.stage_of(spec.name)] for spec in layout.buffers),
        places[-1],
    )


def _message_bytes(cut: Cut) -> int:
    """Memory for what crosses a cut; where each tensor starts in a line is kept."""
    return sum(aligned(LINE_BYTES + form.size_bytes, LINE_BYTES) for form in cut.forms)


def assemble(
    objects: Objects,
    config: TrainingConfig,
    world: World,
    device: torch.device,
    schedule: Schedule,
    listeners: Emitter | None,
    restore: Callable[[Prepared, TrainingState], Restored],
) -> tuple[Worker, int]:
    """Share memory with the other workers, fill it, and build the engine.

    Arguments:
        restore: called by rank 0 once the state holds its initial values; may load a checkpoint into it.

    Returns the worker and the step from which training starts.
    """
    place = place_of(world, device)
    several = len(place.hosts.sizes) > 1
    feed = Feed(objects.data, config.seed, "training", objects.collate, device)
    prepared = prepare(objects, config, place, feed)
    host, mesh = prepared.host, prepared.mesh
    arena = _map(world.arena(host.size_bytes, alone=host.slots == 1), host.size_bytes)
    memory = DeviceMemory(device) if device.type != "cpu" else lambda region: arena.tensor(region, torch.uint8)
    local = HostGroup(
        arena,
        host,
        prepared.partials,
        place.local_rank,
        range(host.slots),
        1,
        config.deadline_s,
        memory=memory,
        names=place.local_name,
        teams=[[mesh.rank(data=d, pipeline=r) for d in range(mesh.data)] for r in range(mesh.pipeline)],
    )
    local.assemble(_fingerprint(prepared, config, feed.size))
    group = join_hosts(prepared.layout, config, local, place, world, device, feed.size) if several else local
    try:
        return _worker(objects, config, prepared, group, local, memory, feed, schedule, listeners, restore)
    except BaseException as error:
        group.close(error)
        raise


def _worker(
    objects: Objects,
    config: TrainingConfig,
    prepared: Prepared,
    group: Group,
    local: HostGroup,
    memory: Callable[[Region], Tensor],
    feed: Feed,
    schedule: Schedule,
    listeners: Emitter | None,
    restore: Callable[[Prepared, TrainingState], Restored],
) -> tuple[Worker, int]:
    """A worker over its group, and the step from which it starts."""
    host, device = prepared.host, feed.device
    mine = prepared.mesh.coordinates(local.rank)["data"] if host.replicas > 1 else 0
    state = TrainingState(prepared.layout, memory(host.state(mine)))
    snapshot = TrainingState(prepared.layout, memory(host.snapshot()), frozen=state)
    versions = local.arena.words(host.versions(mine))
    step = _fill(prepared, group, local, state, memory, versions, restore)
    memories = RunMemory(prepared.layout, state.memory, memory(host.undo(local.slot)), snapshot.memory)
    replica = _replica(prepared, objects, config, state, device)
    policy = _policy(prepared, config, group, local, state, memories, versions, schedule)
    share, passages = _share(prepared, config, group, local)
    sampler = Sampler(feed.size, config.seed, config.global_batch_size, config.micro_batch_size)
    names = [name for name, _ in prepared.layout.flat.uses] + [spec.name for spec in prepared.layout.buffers]
    engine = Engine(
        group,
        replica,
        TrainingFeed(feed, sampler),
        policy,
        share,
        Phases(group, listeners),
        names,
        passages,
    )
    evaluator = None
    if objects.validation is not None:
        held_out = Feed(objects.validation, config.seed, "validation", objects.collate, device)
        evaluator = Evaluator(
            group, replica, held_out, config.micro_batch_size, config.validation.samples, objects.metrics
        )
    return Worker(prepared, group, state, snapshot, replica, engine, evaluator), step


def _share(
    prepared: Prepared, config: TrainingConfig, group: Group, local: HostGroup
) -> tuple[WorkShare, Passages | None]:
    """What this worker does in a step, and its ways to the other stages of its replica."""
    layout = config.layout
    replica, worker = divmod(group.rank, layout.model_workers)
    own = micro_batches(config.micro_batches, group.size // layout.model_workers)[replica]
    if prepared.passages is None:
        return work_share(own, config.micro_batches), None
    table = timetable(layout.schedule, layout.pipeline, own, layout.virtual_stages)
    passages = Passages(local, prepared.passages, prepared.mesh.coordinates(local.rank)["data"])
    return work_share(own, config.micro_batches, table.workers[worker]), passages


def _map(descriptor: int | None, size_bytes: int) -> Arena:
    """The arena; the mapping keeps what it needs, so that the descriptor does not keep the memory."""
    try:
        return Arena(descriptor, size_bytes)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _replica(
    prepared: Prepared, objects: Objects, config: TrainingConfig, state: TrainingState, device: torch.device
) -> Replica:
    """The model over the state's values."""
    flat, buffers = prepared.layout.flat, [spec.name for spec in prepared.layout.buffers]
    bound = bind(prepared.model, flat, state.values)
    recomputation = None
    if config.layout.recompute != "none":
        again = blocks(prepared.model, prepared.division)
        recomputation = Recomputation(prepared.model, again, selective=config.layout.recompute == "selective")
    uses = [(name, parameter) for (name, _), parameter in zip(flat.uses, bound, strict=True)]
    return Replica(
        prepared.model,
        uses,
        Buffers(prepared.model, buffers, state.buffers),
        ModuleRandom(prepared.model, config.seed, device),
        objects.loss,
        config.precision,
        device,
        Stages(prepared.model, prepared.division) if prepared.division is not None else None,
        recomputation,
    )


def _policy(
    prepared: Prepared,
    config: TrainingConfig,
    group: Group,
    local: HostGroup,
    state: TrainingState,
    memories: RunMemory,
    versions: memoryview,
    schedule: Schedule,
) -> EveryStep:
    """How the workers agree, and what this one updates."""
    layout = prepared.layout
    optimizer = BlockOptimizer(prepared.optimizer, prepared.update, state.python_state())
    joinable = state.memory.device.type == "cpu" and config.threads == 1
    owner = Owner(state, memories, prepared.originals, config.clip is not None, prepared.teams, joinable)
    owned = owner.prepare(prepared.owned[local.rank], optimizer)
    buffers = None
    if layout.buffers and _is_head(prepared, local):
        buffers = OwnedBuffers(memories.image(layout.buffer_run), state.buffers)
    rates = Rates(schedule, scale(config.scaling, config.global_batch_size), config.clip)
    journal = Journal(local.header.slot(local.slot), versions)
    sharers = local.size // prepared.host.replicas
    return EveryStep(
        group, layout.flat, prepared.teams, config.micro_batches, sharers, owned, buffers, journal, optimizer, rates
    )


def _is_head(prepared: Prepared, local: HostGroup) -> bool:
    """Whether this worker does what is done once for each state."""
    return local.rank % (local.size // prepared.host.replicas) == 0


def _fingerprint(prepared: Prepared, config: TrainingConfig, samples: int) -> int:
    """A hash of what all workers must agree on, never 0."""
    agreed = (prepared.layout, prepared.host, samples, config.model_dump(exclude={"run_dir", "observe"}))
    return int.from_bytes(hashlib.sha256(repr(agreed).encode()).digest()[:8], "little") | 1


def _fill(
    prepared: Prepared,
    group: Group,
    local: HostGroup,
    state: TrainingState,
    memory: Callable[[Region], Tensor],
    versions: memoryview,
    restore: Callable[[Prepared, TrainingState], Restored],
) -> int:
    """Initial values, or those of a checkpoint, by rank 0; all others have copies of its own. Returns the step."""
    step, failure, compression = 0, "", Restored().compression
    if group.rank == 0:
        with torch.no_grad():
            for value, parameter in zip(state.values, prepared.originals, strict=True):
                value.copy_(parameter)
            for value, (_, buffer) in zip(state.buffers, prepared.tensors.buffers, strict=True):
                value.copy_(buffer)
        try:
            restored = restore(prepared, state)
            step, compression = restored.step, restored.compression
        except UnisonoError as error:  # of which all hear, so that none waits
            failure = str(error)
            group.all_gather(json.dumps([step, failure]).encode(), "initial state")
            raise
    said = json.loads(group.all_gather(json.dumps([step, failure]).encode(), "initial state")[0])
    step, failure = int(said[0]), str(said[1])
    if failure:
        raise CheckpointError(failure)
    if local.rank == 0:
        for part in state.parts():
            group.broadcast(part, "initial state")
        group.restore_compression(compression)
    local.barrier("initial state")
    if local.rank > 0 and _is_head(prepared, local):
        state.memory.copy_(memory(prepared.host.state(0)))
    if _is_head(prepared, local):
        for block in range(len(versions)):
            versions[block] = step
    group.finish(step)
    group.settle(step)
    return step


def describe(prepared: Prepared, run: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records besides tensors (see `state.checkpoint.Description`)."""
    plain = set(prepared.model.state_dict(keep_vars=True))
    ties = {name: uses[0] for _, uses in prepared.tensors.parameters for name in uses[1:]}
    first = {id(buffer): name for name, buffer in prepared.tensors.buffers}
    for name, buffer in prepared.model.named_buffers(remove_duplicate=False):
        if name in plain and first.get(id(buffer), name) != name:
            ties[name] = first[id(buffer)]
    buffers = tuple(name for name, _ in prepared.tensors.buffers if name in plain)
    return {"ties": ties, "plain_buffers": buffers, "run": run, "fingerprint": fingerprint}
