"""One worker put together: from the user's objects and the configuration to an engine over shared memory."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.comm.arena import Arena, DeviceMemory, Region
from unisono.comm.host import HostGroup, HostLayout, host_layout
from unisono.comm.journal import Image, Journal
from unisono.comm.partial import PartialLayout, partial_layout
from unisono.config import TrainingConfig
from unisono.data.feed import Collate, Dataset, Feed, TrainingFeed
from unisono.engine import Engine, work_share
from unisono.errors import ConfigurationError
from unisono.evaluation import Evaluator, Metrics
from unisono.events import Emitter
from unisono.launch.world import World
from unisono.optim.blockwise import BlockOptimizer, Stretch, Unit
from unisono.optim.classes import pin_variant, update_class
from unisono.optim.eager import without_compiler
from unisono.optim.schedules import Schedule, scale
from unisono.optim.state_spec import state_spec
from unisono.parallel.bind import ModelTensors, bind, model_tensors, unbind
from unisono.parallel.buffers import Buffers
from unisono.parallel.replicated import Loss, Replica
from unisono.plan.assignment import Run, UpdateClass, micro_batches, owners, runs
from unisono.plan.blocks import flat_layout
from unisono.run.rng import Isolation, ModuleRandom, derive
from unisono.run.sampling import Sampler
from unisono.state.layout import StateLayout, state_layout
from unisono.state.training_state import TrainingState
from unisono.sync.every_step import EveryStep, OwnedBuffers, OwnedRun, Rates
from unisono.sync.phases import Phases
from unisono.sync.sums import Span

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
    """A model and an optimizer, and all that follows from them and the configuration, before memory is shared."""

    model: nn.Module
    tensors: ModelTensors
    optimizer: Optimizer
    originals: Sequence[nn.Parameter]
    update: UpdateClass
    layout: StateLayout
    partials: PartialLayout
    owned: tuple[tuple[Run, ...], ...]
    host: HostLayout


@dataclass(slots=True)
class Worker:
    """A worker ready to train."""

    prepared: Prepared
    group: HostGroup
    state: TrainingState
    snapshot: TrainingState
    versions: memoryview
    replica: Replica
    engine: Engine
    evaluator: Evaluator | None
    released: bool = False

    def release(self) -> None:
        """Give the model memory of its own; once."""
        if not self.released:
            self.released = True
            self.replica.buffers.invalidate()
            self.replica.buffers.reset()
            self.replica.close()
            unbind(self.prepared.model, self.prepared.layout.flat)


def prepare(objects: Objects, config: TrainingConfig, workers: int, device: torch.device) -> Prepared:
    """Build the model and lay everything out; the same in every worker.

    Raises:
        ConfigurationError: where the objects cannot be trained.
    """
    with Isolation() as random:
        random.seed(derive(config.seed, "init"))
        model = objects.model()
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"the model's factory returned {type(model).__name__}; return a torch.nn.Module")
    model.to(device)
    tensors = model_tensors(model)
    with without_compiler():
        optimizer = objects.optimizer([p for p, _ in tensors.parameters])
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"the optimizer's factory returned {type(optimizer).__name__}; return a torch.optim.Optimizer"
        )
    update = update_class(optimizer)
    pin_variant(optimizer)
    specs = tensors.parameter_specs(optimizer)
    flat = flat_layout(specs)
    by_name = {uses[0]: p for p, uses in tensors.parameters}
    originals = [by_name[spec.tensor.name] for spec in flat.parameters]
    layout = state_layout(flat, state_spec(optimizer, update, flat, originals), tensors.buffer_specs())
    partials = partial_layout(flat, tensors.buffer_specs())
    if config.layout.zero == 0:
        shares = tuple(range(len(flat.blocks)) for _ in range(workers))
    else:
        shares = owners(flat, update, workers)
    owned = tuple(runs(flat, update, share) for share in shares)
    images = [layout.image(run) for share in owned for run in share] + [layout.image(layout.buffer_run)]
    most = max(sum(_padded(region.size_bytes) for region in image) for image in images)
    host = host_layout(
        slots=workers,
        blocks=layout.blocks,
        entries=2 * max(1, (config.micro_batches - 1).bit_length()) + 2,
        partial_bytes=partials.size_bytes,
        state_bytes=layout.size_bytes,
        replicas=workers if config.layout.zero == 0 else 1,
        undo_bytes=most,
    )
    return Prepared(model, tensors, optimizer, originals, update, layout, partials, owned, host)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // 64) * 64


def assemble(
    objects: Objects,
    config: TrainingConfig,
    world: World,
    device: torch.device,
    schedule: Schedule,
    listeners: Emitter | None,
    restore: Callable[[Prepared, TrainingState], int],
) -> tuple[Worker, int]:
    """Share memory with the other workers, fill it, and build the engine.

    Arguments:
        restore: called by rank 0 once the state holds its initial values; may load a checkpoint into it, and returns
            the step it is at.

    Returns the worker and the step from which training starts.
    """
    prepared = prepare(objects, config, world.size, device)
    host = prepared.host
    arena = Arena(world.arena(host.size_bytes), host.size_bytes)
    memory = DeviceMemory(device) if device.type != "cpu" else lambda region: arena.tensor(region, torch.uint8)
    group = HostGroup(
        arena, host, prepared.partials, world.rank, range(world.size), 1, config.deadline_s, memory=memory
    )
    feed = Feed(objects.data, config.seed, "training", objects.collate, device)
    group.assemble(_fingerprint(prepared, config, feed.size))
    replicated = config.layout.zero == 0
    state = TrainingState(prepared.layout, memory(host.state(world.rank if replicated else 0)))
    snapshot = TrainingState(prepared.layout, memory(host.snapshot()), frozen=state)
    versions = arena.words(host.versions(world.rank if replicated else 0))
    step = _fill(prepared, group, state, memory, versions, restore)
    flat = prepared.layout.flat
    bound = bind(prepared.model, flat, state.values)
    gc.collect()  # the values that the model was built with
    uses = [(name, p) for (name, _), p in zip(flat.uses, bound, strict=True)]
    buffers = Buffers(prepared.model, [spec.name for spec in prepared.layout.buffers], state.buffers)
    random = ModuleRandom(prepared.model, config.seed, device)
    replica = Replica(prepared.model, uses, buffers, random, objects.loss, config.precision, device)
    journal = Journal(group.header.slot(world.rank), versions)
    optimizer = BlockOptimizer(prepared.optimizer, prepared.update, state.python_state())
    rates = Rates(schedule, scale(config.scaling, config.global_batch_size), config.clip)
    images = _Images(prepared, state.memory, memory(host.undo(world.rank)), snapshot.memory)
    owned = _owned_runs(
        prepared,
        state,
        images,
        optimizer,
        prepared.owned[world.rank],
        keep=config.clip is not None,
        joinable=device.type == "cpu" and config.threads == 1,
    )
    commits_buffers = bool(prepared.layout.buffers) and (replicated or world.rank == 0)
    policy = EveryStep(
        group,
        flat,
        config.micro_batches,
        owned,
        OwnedBuffers(images.of(prepared.layout.buffer_run), state.buffers) if commits_buffers else None,
        journal,
        optimizer,
        rates,
    )
    sampler = Sampler(feed.size, config.seed, config.global_batch_size, config.micro_batch_size)
    share = micro_batches(config.micro_batches, world.size)[world.rank]
    names = [name for name, _ in flat.uses] + [spec.name for spec in prepared.layout.buffers]
    engine = Engine(
        group,
        replica,
        TrainingFeed(feed, sampler),
        policy,
        work_share(share, config.micro_batches),
        Phases(group, listeners),
        names,
    )
    evaluator = None
    if objects.validation is not None:
        held_out = Feed(objects.validation, config.seed, "validation", objects.collate, device)
        evaluator = Evaluator(
            group, replica, held_out, config.micro_batch_size, config.validation.samples, objects.metrics
        )
    return Worker(prepared, group, state, snapshot, versions, replica, engine, evaluator), step


def _fingerprint(prepared: Prepared, config: TrainingConfig, samples: int) -> int:
    """A hash of what all workers must agree on, never 0."""
    agreed = (prepared.layout, prepared.host, samples, config.model_dump(exclude={"run_dir", "observe"}))
    return int.from_bytes(hashlib.sha256(repr(agreed).encode()).digest()[:8], "little") | 1


def _fill(
    prepared: Prepared,
    group: HostGroup,
    state: TrainingState,
    memory: Callable[[Region], Tensor],
    versions: memoryview,
    restore: Callable[[Prepared, TrainingState], int],
) -> int:
    """Initial values, or those of a checkpoint, by rank 0; replicas are copies of its own. Returns the step."""
    step = 0
    if group.rank == 0:
        with torch.no_grad():
            for value, parameter in zip(state.values, prepared.originals, strict=True):
                value.copy_(parameter)
            for value, (_, buffer) in zip(state.buffers, prepared.tensors.buffers, strict=True):
                value.copy_(buffer)
        step = restore(prepared, state)
    step = int.from_bytes(group.all_gather(step.to_bytes(8, "little"), "initial state")[0], "little")
    if prepared.host.replicas > 1 and group.rank > 0:
        state.memory.copy_(memory(prepared.host.state(0)))
    if group.rank == 0 or prepared.host.replicas > 1:
        for block in range(len(versions)):
            versions[block] = step
    group.finish(step)
    group.settle(step)
    return step


class _Images:
    """The memory of runs, as the journal wants it."""

    def __init__(self, prepared: Prepared, live: Tensor, undo: Tensor, snapshot: Tensor) -> None:
        self._layout = prepared.layout
        self._live = live
        self._undo = undo
        self._snapshot = snapshot

    def of(self, run: Run) -> Image:
        """One run's memory, where its old bytes go, and where they go while a snapshot is taken."""
        live, undo, snapshot = [], [], []
        used = 0
        for region in self._layout.image(run):
            start, stop = region.offset, region.offset + region.size_bytes
            live.append(self._live[start:stop])
            snapshot.append(self._snapshot[start:stop])
            undo.append(self._undo[used : used + region.size_bytes])
            used += _padded(region.size_bytes)
        return Image(run.first, run.stop - run.first, live, undo, snapshot)


def _owned_runs(
    prepared: Prepared,
    state: TrainingState,
    images: _Images,
    optimizer: BlockOptimizer,
    mine: Sequence[Run],
    *,
    keep: bool,
    joinable: bool,
) -> list[OwnedRun]:
    """Prepare a worker's runs.

    Arguments:
        keep: every run has scratch memory of its own, since clipping comes between its sum and its update.
        joinable: blocks may be updated as one tensor. With more than one thread a kernel divides a tensor by its size,
            wherever that falls, so blocks stay apart.
    """
    layout = prepared.layout
    device = state.memory.device
    shared: dict[str, Tensor] = {}
    result = []
    for run in mine:
        spans: list[Span] = []
        for segment, start, stop in layout.spans(run):
            dtype = getattr(torch, layout.flat.segment_dtypes[segment])
            key = f"{dtype} {len(spans)}"
            if keep or key not in shared or shared[key].numel() < stop - start:
                shared[key] = torch.zeros(stop - start, dtype=dtype, device=device)
            spans.append(Span(segment, start, stop, shared[key][: stop - start]))
        gradients = [_within(spans, layout, block) for block in range(run.first, run.stop)]
        units = _units(prepared, state, run)
        for unit, first, count in units:
            optimizer.attach(
                unit, _unit_gradient(unit, gradients[first - run.first : first - run.first + count], spans)
            )
        tied = any(len(layout.flat.uses_of(b.parameter)) > 1 for b in layout.flat.blocks[run.first : run.stop])
        stretch = None
        if prepared.update is UpdateClass.ELEMENT and len(spans) == 1 and joinable:
            stretch = _stretch(spans[0], state, run, units[0][0])
            optimizer.attach(stretch.unit, spans[0].scratch)
        result.append(OwnedRun(run, images.of(run), spans, [unit for unit, _, _ in units], stretch, gradients, tied))
    return result


def _stretch(span: Span, state: TrainingState, run: Run, first: Unit) -> Stretch:
    """A whole run as one unit."""
    unit = Unit(
        parameter=first.parameter,
        name=first.name,
        group=first.group,
        original=first.original,
        span=first.span,
        values=state.span(span.segment, span.start, span.stop),
        state=state.span_state(span.segment, span.start, span.stop, run.first),
        present=state.present(run.first),
    )
    return Stretch(unit, state.rows(run.first, run.stop))


def _within(spans: Sequence[Span], layout: StateLayout, block: int) -> Tensor:
    place = layout.flat.block_place(layout.flat.blocks[block])
    for span in spans:
        if span.segment == place.segment and span.start <= place.offset < span.stop:
            return span.scratch[place.offset - span.start : place.offset - span.start + place.numel]
    raise AssertionError("a run's spans hold all its blocks")


def _unit_gradient(unit: Unit, blocks: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
    """The gradient of a unit in the unit's shape: its blocks lie behind each other in scratch memory."""
    first = blocks[0]
    whole = torch.as_strided(first, (unit.values.numel(),), (1,), first.storage_offset())
    return whole.view(unit.values.shape)


def _units(prepared: Prepared, state: TrainingState, run: Run) -> list[tuple[Unit, int, int]]:
    """What the optimizer sees of a run: (unit, first block, number of blocks)."""
    flat = prepared.layout.flat
    units: list[tuple[Unit, int, int]] = []
    for index in range(run.first, run.stop):
        block = flat.blocks[index]
        if prepared.update is not UpdateClass.ELEMENT and block.index > 0:
            unit, first, count = units[-1]
            units[-1] = (unit, first, count + 1)
            continue
        parameter = flat.parameters[block.parameter]
        assert parameter.group is not None
        if prepared.update is UpdateClass.ELEMENT:
            place = flat.padded_place(block)
            extent = (place.segment, place.offset, place.offset + place.numel)
            values, kept = state.span(*extent), state.span_state(*extent, index)
            span = slice(block.start, block.stop)
        else:
            values, kept = state.values[block.parameter], state.parameter_state(block.parameter)
            span = slice(0, parameter.tensor.numel)
        unit = Unit(
            parameter=block.parameter,
            name=parameter.tensor.name,
            group=parameter.group,
            original=prepared.originals[block.parameter],
            span=span,
            values=values,
            state=kept,
            present=state.present(index),
        )
        units.append((unit, index, 1))
    return units


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
