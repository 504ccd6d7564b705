"""A run laid out before memory is shared: the user's objects, and all that follows from them and the configuration."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unisono.combinations import (
    refuse_coupled,
    refuse_tied_with_newton,
    refuse_with_curvature,
    refuse_with_newton,
)
from unisono.comm.foretold import foretold_bytes
from unisono.comm.forms import LINE_BYTES
from unisono.comm.header import ENTRIES
from unisono.comm.host_layout import HostLayout, host_layout
from unisono.comm.partial import PartialLayout, item_size, partial_layout
from unisono.comm.passage_layout import PassageLayout
from unisono.config import TrainingConfig
from unisono.data.feed import Collate, Dataset, Feed
from unisono.errors import ConfigurationError
from unisono.evaluation import Metrics
from unisono.launch.membership import way
from unisono.optim.classes import pin_variant, update_class
from unisono.optim.eager import without_compiler
from unisono.optim.kfac import KFAC
from unisono.optim.kronecker import Factors
from unisono.optim.newton import NewtonCG
from unisono.optim.state_spec import OptimizerSpec, state_spec, with_further
from unisono.parallel.beside import own_model, with_curvature, with_replicas
from unisono.parallel.bind import ModelTensors, model_tensors
from unisono.parallel.initial import without_values
from unisono.parallel.micro_batch import Loss
from unisono.parallel.tensor_trial import ProvenPlan
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
from unisono.plan.blocks import FlatLayout, aligned, flat_layout, split_name
from unisono.plan.curvature import joined
from unisono.plan.exchange import turns
from unisono.plan.homes import Homes
from unisono.plan.hosts import Place
from unisono.plan.lock_free import LockFreeLayout
from unisono.plan.mesh import Mesh
from unisono.plan.outline import Cut
from unisono.plan.partition import Division, divide
from unisono.plan.pool import PoolLayout
from unisono.plan.rounds import RoundsLayout
from unisono.plan.schedule import placement
from unisono.plan.shards import StateShards, replica_shards, server_shards, state_shards
from unisono.plan.stash import Stashing, StepWords, stage_delay
from unisono.rehearsing import rehearse, tensor_parallel_plan
from unisono.run.rng import Isolation, derive
from unisono.run.summation import accumulation
from unisono.state.layout import StateLayout, state_layout
from unisono.sync.divided import dense_elements, divided
from unisono.sync.local import kept_by_agreements
from unisono.sync.ownership import undo_bytes
from unisono.sync.tables import Table, rows_bytes, tables_of

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
        stashing: the versions of parameters; None where there is one.
        tables: parameters of which workers that push change some rows.
        servers: the runs of each part of a parameter server; none where there is none.
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
    stashing: Stashing | None
    tables: Sequence[Table]
    servers: Sequence[Sequence[Run]]
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

    def shards_of(self, hosts: int, config: TrainingConfig) -> StateShards | None:
        """Who would keep what if so many hosts shared the state; None for one."""
        return None if hosts == 1 else _shards(self.layout.flat, self.update, self.teams, config, hosts, self.servers)

    def homes(self, config: TrainingConfig) -> Homes:
        """Where the parts of a parameter server are."""
        return Homes(self.place.hosts, len(self.servers), config.sync.serving)

    @property
    def trained(self) -> nn.Module:
        """The user's model."""
        return own_model(self.model)

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
    if config.sync.apart:
        assert config.sync.replicas is not None
        model = with_replicas(model, config.sync.replicas)
    tensors = model_tensors(model)
    optimizer = _optimizer(objects, config, tensors)
    if isinstance(optimizer, KFAC):
        refuse_with_curvature(config, several_hosts)
        model = with_curvature(model, _factors(optimizer, model))
        tensors = model_tensors(model)
    update, newton = update_class(optimizer), isinstance(optimizer, NewtonCG)
    if newton:
        refuse_with_newton(config, several_hosts)
        refuse_tied_with_newton([uses for _, uses in tensors.parameters])
    if update is UpdateClass.ELEMENT and config.clip is not None and config.clip.agc is not None:
        update = UpdateClass.PARAMETER  # its units are not divided
    refuse_coupled(optimizer, update, config.sync)
    pin_variant(optimizer, feed.device)
    flat = flat_layout(joined(tensors.parameter_specs(optimizer)))
    by_name = {uses[0]: p for p, uses in tensors.parameters}
    originals = [by_name[spec.tensor.name] for spec in flat.parameters]
    nothing = OptimizerSpec(update, tensors=((),) * len(flat.parameters))
    spec = nothing if newton else state_spec(optimizer, update, flat, originals)
    kept = with_further(spec, flat, *kept_by_agreements(config.sync))
    layout = state_layout(flat, kept, tensors.buffer_specs())
    partials = partial_layout(flat, tensors.buffer_specs())
    run_elements = RUN_ELEMENTS if feed.device.type == "cpu" else DEVICE_RUN_ELEMENTS
    tables = tables_of(model, flat, optimizer, config.clip) if config.sync.pushes and not config.sync.in_rounds else []
    if config.sync.mode == "server":  # none without runs
        run_elements = min(run_elements, max(1, dense_elements(flat, tables) // config.sync.servers))
    mesh = Mesh(workers // config.layout.model_workers, config.layout.pipeline, config.layout.tensor)
    division = None
    if config.layout.stages > 1:
        found = rehearse(model, objects.loss, config, feed)
        division = divide(found, config.layout.stages, config.layout.cuts)
    servers: list[Sequence[Run]] = []
    if config.sync.mode == "server":
        servers = divided(layout, update, config.sync.servers, run_elements, tables)
        _refuse_idle_hosts(len(servers), len(place.hosts.sizes))
    teams = _teams(layout, config, division)
    stashing = _stashing(model, objects.loss, config, feed, flat, division)
    replicas = mesh.data if config.layout.zero == 0 else 1
    shards = _shards(flat, update, teams, config, len(place.hosts.sizes), servers) if several_hosts else None
    passages = _passages(config, place, mesh, division) if division is not None else None
    pool = pool_layout(flat, config, place, servers, tables)
    host = host_layout(
        slots=workers,
        blocks=layout.blocks,
        entries=max(
            _entries(config.micro_batches, SHARES_AT_ONCE if shards is None else 1) + (shards.rounds if shards else 0),
            _entries_of_rounds(config, spread=Homes(place.hosts, len(servers), config.sync.serving).spread),
        ),
        partial_bytes=partials.size_bytes,
        state_bytes=layout.size_bytes,
        replicas=replicas,
        undo_bytes=max(undo_bytes(layout, run_elements), *(_undo_bytes(flat, table) for table in tables), 0),
        buckets=len(way(config).buckets(flat, teams)) if several_hosts else 0,
        wire_bytes=way(config).wire_bytes(flat) if several_hosts else 0,
        passages=passages,
        crews=mesh.data * mesh.pipeline if mesh.tensor > 1 else 0,
        crew=mesh.tensor,
        pool_bytes=pool.size_bytes if stashing is None else StepWords.size_bytes(stashing.units),
        claims_bytes=pool.size_bytes if isinstance(pool, RoundsLayout) else 0,
        foretold_bytes=foretold_bytes(config.micro_batches, partials.scalars) if config.sync.apart else 0,
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
        stashing=stashing,
        tables=tables,
        servers=servers,
        run_elements=run_elements,
        copies=config.init != "by_name",
    )


def pool_layout(
    flat: FlatLayout,
    config: TrainingConfig,
    place: Place,
    servers: Sequence[Sequence[Run]],
    tables: Sequence[Table],
) -> LockFreeLayout | PoolLayout | RoundsLayout:
    """The pool of a step, where workers take units from one; an empty one where they do not.

    Arguments:
        servers: the runs of each.
        tables: which are runs of their own.
    """
    if not config.sync.pushes:
        return LockFreeLayout(0, 0)
    units, workers = config.micro_batches // config.sync.push, place.hosts.size
    if config.sync.mode == "hogwild":
        return LockFreeLayout(workers, units)
    if config.sync.in_rounds:
        assert config.sync.accepted is not None
        return RoundsLayout(workers, units, len(servers), config.sync.accepted, config.sync.backup)
    rows = sum(flat.parameters[table.parameter].tensor.shape[0] for table in tables)
    counts = [len(servers[0]) + 1, *map(len, servers[1:])]  # the first has the buffers as well
    here = Homes(place.hosts, len(servers)).on(place.host)
    return PoolLayout(workers, units, tuple(n if number in here else 0 for number, n in enumerate(counts)), rows)


def _refuse_idle_hosts(servers: int, hosts: int) -> None:
    if servers == 0:
        raise ConfigurationError("sync.mode server has nothing to serve: no parameter of the model is trained")
    if servers < hosts:
        raise ConfigurationError(
            f"the model makes {servers} servers, and there are {hosts} hosts, each of which keeps one at least; use "
            "fewer hosts, or a larger sync.servers"
        )


def _undo_bytes(flat: FlatLayout, table: Table) -> int:
    """Of an undo area that holds all rows of a table."""
    spec = flat.parameters[table.parameter].tensor
    return rows_bytes(spec.shape[0], spec.numel * item_size(spec.dtype) // max(1, spec.shape[0]))


def _shards(
    flat: FlatLayout,
    update: UpdateClass,
    teams: Teams,
    config: TrainingConfig,
    hosts: int,
    servers: Sequence[Sequence[Run]],
) -> StateShards | None:
    """Which host keeps what; None where each has all of it."""
    if config.sync.apart:
        return replica_shards(flat, hosts)
    if servers:
        return server_shards(flat, servers, hosts)
    if not config.layout.zero:
        return None
    rounds = turns(config.micro_batches, hosts) if config.layout.zero in (2, 3) else 0
    buckets = way(config).buckets(flat, teams)
    return state_shards(flat, update, buckets, hosts, rounds, values=config.layout.zero == 3)


def _entries(count: int, shares: int) -> int:
    """Partials that a worker may hold at once, of so many shares of a step's micro-batches."""
    return min(ENTRIES // 2, shares * (2 * max(1, (count - 1).bit_length()) + 2))


def _entries_of_rounds(config: TrainingConfig, *, spread: bool) -> int:
    """Partials of a worker that computes all units of a round alone, and one that comes late; 0 without rounds.

    Arguments:
        spread: and of one that is brought all units of a round by others.

    Raises:
        ConfigurationError: where they are more than a worker may hold.
    """
    sync = config.sync
    if not sync.in_rounds:
        return 0
    assert sync.accepted is not None
    each = accumulation(0, sync.push, sync.push)[1]
    counting = min(sync.accepted, config.micro_batches // sync.push)
    needed = each * (1 + counting) + counting * spread
    if needed > ENTRIES:
        raise ConfigurationError(
            f"sync.accepted is {sync.accepted}: a worker would hold up to {needed} sums at once, and {ENTRIES} are "
            "possible; accept fewer, or use a larger micro_batch_size"
        )
    return needed


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
    members: dict[int, list[nn.Parameter]] = {}
    for parameter, uses in tensors.parameters:
        members.setdefault(split_name(uses[0])[0], []).append(parameter)
    with without_compiler():
        optimizer, *others = [objects.optimizer(parameters) for parameters in members.values()]
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"the optimizer's factory returned {type(optimizer).__name__}; return a torch.optim.Optimizer"
        )
    for other in others:  # one for all replicas, with groups for each of them
        optimizer.param_groups += other.param_groups
        optimizer.state.update(other.state)
    if config.wire.momentum and any(group.get("momentum") for group in optimizer.param_groups):
        raise ConfigurationError(
            f"wire.momentum is {config.wire.momentum} and the optimizer has momentum of its own, which would count "
            "twice; set the optimizer's to 0"
        )
    if config.sync.damping in ("momentum", "both") and not any(g.get("momentum") for g in optimizer.param_groups):
        raise ConfigurationError(
            f"sync.damping is {config.sync.damping}, and {type(optimizer).__name__} has no momentum to lower; use "
            "damping: rate, or an optimizer with momentum"
        )
    return optimizer


def _factors(optimizer: KFAC, model: nn.Module) -> dict[str, Factors]:
    """Memory for what an optimizer learns of a model's curvature."""
    try:
        with without_compiler():
            return optimizer.factors_of(model)
    except ValueError as error:
        raise ConfigurationError(f"optimizer KFAC cannot be used: {error}; use LAMB or AdamW") from error


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


def _stashing(
    model: nn.Module,
    loss: Loss,
    config: TrainingConfig,
    feed: Feed,
    flat: FlatLayout,
    division: Division | None,
) -> Stashing | None:
    """The versions of each parameter, by its stage.

    Raises:
        ConfigurationError: where a parameter belongs to several stages, which are updated at different times.
    """
    sync, units = config.sync, config.micro_batches // config.sync.push
    if not sync.stashes:
        return None
    if sync.mode == "pipedream" and division is None:
        assert sync.stages is not None
        division = divide(rehearse(model, loss, config, feed), sync.stages)
    stages: list[int] = []
    for spec in flat.parameters:
        found = sorted({0 if division is None else division.stage_of(name) for name in spec.uses})
        if len(found) > 1:
            raise ConfigurationError(
                f"{spec.tensor.name} is used in stages {found[0]} and {found[1]}, which sync.mode {sync.mode} updates "
                "at different times; untie it"
            )
        stages += found
    if division is None or sync.mode == "pipedream_2bw":
        return Stashing(sync.push, units, (1,) * len(stages), (1,))
    kinds = tuple(stage_delay(stage, division.stages) for stage in range(division.stages))
    return Stashing(sync.push, units, tuple(kinds[stage] for stage in stages), kinds)


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
    ties = {name: first for name, first in tensors.ties.items() if not split_name(name)[0]}
    return {"ties": ties, "plain_buffers": tensors.plain_buffers, "run": run, "fingerprint": fingerprint}
