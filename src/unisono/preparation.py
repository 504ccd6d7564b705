"""A run laid out before memory is shared: the user's objects, and all that follows from them and the configuration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unisono.comm.forms import LINE_BYTES
from unisono.comm.header import ENTRIES
from unisono.comm.host_layout import HostLayout, host_layout
from unisono.comm.partial import PartialLayout, partial_layout
from unisono.comm.passage_layout import PassageLayout
from unisono.config import TrainingConfig
from unisono.data.feed import Collate, Dataset, Feed
from unisono.errors import ConfigurationError
from unisono.evaluation import Metrics
from unisono.launch.membership import way
from unisono.optim.classes import pin_variant, update_class
from unisono.optim.eager import without_compiler
from unisono.optim.state_spec import state_spec
from unisono.parallel.bind import ModelTensors, model_tensors
from unisono.parallel.initial import without_values
from unisono.parallel.recompute import blocks
from unisono.parallel.replicated import Loss, call, split
from unisono.parallel.tensor_trial import ProvenPlan, proven_plan
from unisono.plan.assignment import (
    DEVICE_RUN_ELEMENTS,
    RUN_ELEMENTS,
    Run,
    Teams,
    UpdateClass,
    micro_batches,
    one_team,
    owners,
    runs,
)
from unisono.plan.blocks import FlatLayout, aligned, flat_layout
from unisono.plan.flow import flow
from unisono.plan.hosts import Place
from unisono.plan.mesh import Mesh
from unisono.plan.outline import Cut, Outline
from unisono.plan.partition import Division, divide
from unisono.plan.rehearsal import outline
from unisono.plan.schedule import placement
from unisono.plan.sharding import within
from unisono.plan.shards import StateShards, state_shards
from unisono.run.rng import Isolation, derive
from unisono.state.layout import StateLayout, state_layout
from unisono.sync.ownership import undo_bytes

SHARES_AT_ONCE = 4
"""Of a worker in a step: its own, and what it takes over. What is not touched takes no memory."""

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
        mesh: of this host's workers.
        place: of this worker among all.
        division, passages: of the model into stages, and the memory between them; None where there is one stage.
        shards: which host keeps what; None where each has all of it.
        tensor: what the tensor-parallel workers divide; None where there is one.
        run_elements: at the most that an owner updates at once.
        copies: every worker's model has memory of its own when training is over; else it stays in what is shared.
    """

    model: nn.Module
    tensors: ModelTensors
    optimizer: Optimizer
    originals: Sequence[nn.Parameter]
    update: UpdateClass
    layout: StateLayout
    partials: PartialLayout
    host: HostLayout
    mesh: Mesh
    place: Place
    teams: Teams
    division: Division | None
    passages: PassageLayout | None
    shards: StateShards | None
    tensor: ProvenPlan | None
    run_elements: int
    copies: bool

    def owned(self, members: Sequence[int]) -> dict[int, list[Run]]:
        """The runs that each of these workers of this host updates; the buffers, a run too, go to the first of a state.

        Where a part of the model has lost all that computed with it, all share all blocks.
        """
        result: dict[int, list[Run]] = {}
        kept = self.shards.blocks(self.place.host) if self.shards is not None else None
        for sharing in self._sharing(members):
            teams, crews = self.teams, [[s for s in sum(crew, ()) if s in sharing] for crew in crews_of(self.mesh)]
            if not all(crews):
                teams, crews = one_team(self.layout.flat, len(self.layout.buffers)), [list(sharing)]
            slots = [slot for crew in crews for slot in crew]
            numbered = [[slots.index(slot) for slot in crew] for crew in crews]
            shares = owners(self.layout.flat, self.update, numbered, teams, kept)
            for slot, share in zip(slots, shares, strict=True):
                result[slot] = list(runs(self.layout.flat, self.update, share, self.run_elements))
            result[min(sharing)].append(self.layout.buffer_run)
        return result

    @property
    def sharers(self) -> int:
        """Workers of this host that share a state."""
        return self.mesh.size // self.host.replicas

    def _sharing(self, members: Sequence[int]) -> list[list[int]]:
        """Those of these workers who share a state."""
        if self.host.replicas == 1:
            return [list(members)]
        number = {slot: self.mesh.coordinates(slot)["data"] for slot in members}
        return [[s for s in members if number[s] == replica] for replica in sorted(set(number.values()))]


def prepare(objects: Objects, config: TrainingConfig, place: Place, feed: Feed) -> Prepared:
    """Build the model and lay everything out; the same in every worker of a host.

    Raises:
        ConfigurationError: where the objects cannot be trained.
    """
    workers, several_hosts = place.hosts.sizes[place.host], len(place.hosts.sizes) > 1
    model = _model(objects, config, feed.device)
    tensors = model_tensors(model)
    optimizer = _optimizer(objects, config, tensors)
    update = update_class(optimizer)
    pin_variant(optimizer, feed.device)
    flat = flat_layout(tensors.parameter_specs(optimizer))
    by_name = {uses[0]: p for p, uses in tensors.parameters}
    originals = [by_name[spec.tensor.name] for spec in flat.parameters]
    layout = state_layout(flat, state_spec(optimizer, update, flat, originals), tensors.buffer_specs())
    partials = partial_layout(flat, tensors.buffer_specs())
    run_elements = RUN_ELEMENTS if feed.device.type == "cpu" else DEVICE_RUN_ELEMENTS
    mesh = Mesh(workers // config.layout.model_workers, config.layout.pipeline, config.layout.tensor)
    division = None
    if config.layout.stages > 1:
        found = rehearse(model, objects.loss, config, feed)
        division = divide(found, config.layout.stages, config.layout.cuts)
    teams = _teams(layout, config, division)
    replicas = mesh.data if config.layout.zero == 0 else 1
    shards = None
    if several_hosts and config.layout.zero:
        hosts = len(place.hosts.sizes)
        rounds = config.micro_batches // hosts if config.layout.zero > 1 else 0
        divides_values = config.layout.zero == 3
        shards = state_shards(flat, update, way(config).buckets(flat, teams), hosts, rounds, values=divides_values)
    passages = _passages(config, place, mesh, division) if division is not None else None
    host = host_layout(
        slots=workers,
        blocks=layout.blocks,
        entries=_entries(config.micro_batches, 1 if several_hosts else SHARES_AT_ONCE)
        + (shards.rounds if shards else 0),
        partial_bytes=partials.size_bytes,
        state_bytes=layout.size_bytes,
        replicas=replicas,
        undo_bytes=undo_bytes(layout, run_elements),
        buckets=len(way(config).buckets(flat, teams)) if several_hosts else 0,
        wire_bytes=way(config).wire_bytes(flat) if several_hosts else 0,
        passages=passages,
        crews=mesh.data * mesh.pipeline if mesh.tensor > 1 else 0,
        crew=mesh.tensor,
    )
    return Prepared(
        model=model,
        tensors=tensors,
        optimizer=optimizer,
        originals=originals,
        update=update,
        layout=layout,
        partials=partials,
        host=host,
        mesh=mesh,
        place=place,
        teams=teams,
        division=division,
        passages=passages,
        shards=shards,
        tensor=tensor_parallel_plan(model, objects.loss, config, feed) if mesh.tensor > 1 else None,
        run_elements=run_elements,
        copies=config.init != "by_name",
    )


def _entries(count: int, shares: int) -> int:
    """Partials that a worker may hold at once, of so many shares of a step's micro-batches."""
    return min(ENTRIES // 2, shares * (2 * max(1, (count - 1).bit_length()) + 2))


def _model(objects: Objects, config: TrainingConfig, device: torch.device) -> nn.Module:
    """The model, built under the run's seed."""
    with Isolation() as random, without_values() if config.init == "by_name" else nullcontext():
        random.seed(derive(config.seed, "init"))
        model = objects.model()
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"the model's factory returned {type(model).__name__}; return a torch.nn.Module")
    model._apply(lambda t: t if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]
    return model


def _optimizer(objects: Objects, config: TrainingConfig, tensors: ModelTensors) -> Optimizer:
    """The optimizer of the model's parameters."""
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
    return optimizer


def rehearse(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> Outline:
    """What a rehearsal on the first micro-batch finds of a model."""
    return outline(model, _forward(model, loss, config, feed))


def tensor_parallel_plan(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> ProvenPlan:
    """What tensor-parallel workers divide of a model."""
    found = flow(model, _forward(model, loss, config, feed))
    layout = config.layout
    return proven_plan(
        model,
        found,
        layout.tensor_plan,
        layout.tensor,
        sequence=layout.sequence_parallel,
        head=layout.loss_parallel,
    )


def _forward(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> Callable[[], object]:
    """The model's loss on the first micro-batch."""
    inputs, target = split(feed.load(list(range(min(config.micro_batch_size, feed.size))), 0, "rehearsal"))

    def forward() -> object:
        with torch.autocast(feed.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            return loss(call(model, inputs), target)

    return forward


def value_groups(
    model: nn.Module, flat: FlatLayout, loss: Loss, config: TrainingConfig, feed: Feed
) -> tuple[list[str], list[list[str]]]:
    """The layers whose parameters are brought together, the whole model first; the trained parameters of each.

    What is used elsewhere too, or under several names, belongs to the whole model.
    """
    users = flow(model, _forward(model, loss, config, feed), "layout.zero=2", strict=True).parameter_users
    layers = blocks(model)
    members: dict[str, list[str]] = {path: [] for path in ("", *layers)}
    for spec in flat.parameters:
        if spec.group is None:
            continue
        name = spec.tensor.name
        found = [path for path in layers if all(within(user, path) for user in (name, *users.get(name, ())))]
        own = max(found, key=len) if found and len(spec.uses) == 1 else ""
        members[own] += spec.uses
    layers = ["", *(path for path in layers if members[path])]
    return layers, [members[path] for path in layers]


def crews_of(mesh: Mesh) -> list[list[tuple[int, ...]]]:
    """For each stage of the pipeline, the ranks of those who compute it together, replica by replica."""
    axes = (range(mesh.pipeline), range(mesh.data), range(mesh.tensor))
    return [[tuple(mesh.rank(data=d, pipeline=p, tensor=t) for t in axes[2]) for d in axes[1]] for p in axes[0]]


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


def _passages(config: TrainingConfig, place: Place, mesh: Mesh, division: Division) -> PassageLayout:
    """The memory between the stages of this host's replicas; any of them may come to compute all micro-batches."""
    several = len(place.hosts.sizes) > 1
    first = sum(place.hosts.sizes[: place.host]) // config.layout.model_workers
    each = micro_batches(config.micro_batches, place.hosts.size // config.layout.model_workers)
    most = [len(share) if several else config.micro_batches for share in each[first : first + mesh.data]]
    counts = tuple(count for count in most for _ in range(mesh.tensor))
    return PassageLayout(counts, tuple(_message_bytes(cut) for cut in division.cuts))


def _message_bytes(cut: Cut) -> int:
    """Memory for what crosses a cut; where each tensor starts in a line is kept."""
    return sum(aligned(LINE_BYTES + form.size_bytes, LINE_BYTES) for form in cut.forms)


def describe(prepared: Prepared, run: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records besides tensors (see `state.checkpoint.Description`)."""
    tensors = prepared.tensors
    return {"ties": dict(tensors.ties), "plain_buffers": tensors.plain_buffers, "run": run, "fingerprint": fingerprint}
