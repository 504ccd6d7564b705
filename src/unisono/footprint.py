"""The memory of every worker of a host, by kind: a prepared run's numbers put into the model of `plan.memory`."""

import os
from dataclasses import replace
from itertools import pairwise

from unisono.comm.partial import item_size
from unisono.config import Layout, TrainingConfig
from unisono.errors import ConfigurationError
from unisono.events import readable
from unisono.parallel.recompute import blocks
from unisono.plan.assignment import micro_batches
from unisono.plan.memory import Activations, ModelState, activations, most_activations, worker_memory
from unisono.plan.outline import Outline, Unit
from unisono.plan.schedule import in_flight, timetable
from unisono.plan.sharding import within
from unisono.preparation import Prepared
from unisono.run.summation import accumulation


def memory_bytes(layout: Layout) -> int:
    """What a host's workers may take: as configured, or the machine's memory."""
    return int(layout.memory_gib * 2**30) if layout.memory_gib is not None else machine_bytes()


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_what_cannot_fit(prepared: Prepared, config: TrainingConfig, limit_bytes: int) -> int:
    """Compare what is known before a rehearsal (after one, in a pipeline) with the machine's memory; what is left.

    Raises:
        ConfigurationError: where the workers of this host would take more.
    """
    found = prepared.division.outline if prepared.division is not None else None
    recompute = "full" if config.layout.recompute == "auto" else config.layout.recompute
    used = footprint(prepared, found, config, recompute)
    total = sum(sum(kinds.values()) for kinds in used)
    if total <= limit_bytes:
        return limit_bytes - total
    by_kind = {kind: sum(kinds[kind] for kinds in used) for kind in used[0]}
    first, second = sorted(by_kind, key=by_kind.__getitem__, reverse=True)[:2]
    remedy = "more hosts with layout.zero=3" + (", fewer workers on this one" if len(used) > 1 else "")
    if "activations" in (first, second) and recompute != "full":
        remedy = "layout.recompute=full"
    raise ConfigurationError(
        f"{len(used)} worker{'s' * (len(used) > 1)} of this host would take {readable(total)}, among it {first} "
        f"{readable(by_kind[first])} and {second} {readable(by_kind[second])}, and it has {readable(limit_bytes)}; use "
        f"{remedy}, or a smaller model (unisono plan shows every worker's part)"
    )


def chosen_recomputation(prepared: Prepared, found: Outline, config: TrainingConfig) -> str:
    """As configured; where that is automatic, the least that fits, or all of it."""
    if config.layout.recompute != "auto":
        return config.layout.recompute
    for recompute in ("none", "selective"):
        used = footprint(prepared, found, config, recompute)
        if sum(sum(kinds.values()) for kinds in used) <= memory_bytes(config.layout):
            return recompute
    return "full"


def edges_of(prepared: Prepared, found: Outline) -> tuple[int, ...]:
    """The first unit of each stage, and the end."""
    return prepared.division.edges if prepared.division is not None else (0, len(found.units))


def footprint(
    prepared: Prepared, found: Outline | None, config: TrainingConfig, recompute: str
) -> list[dict[str, int]]:
    """Bytes by kind of each worker of a host, in order of rank.

    Arguments:
        found: by a rehearsal; without one, activations are left out.
    """
    layout, mesh = config.layout, prepared.mesh
    each = [Activations(0)]
    if found is not None:
        found = _in_parts(prepared, found)
        again = blocks(prepared.model, prepared.division)
        each = [activations(found, range(a, b), recompute, again) for a, b in pairwise(edges_of(prepared, found))]
    states = [_state(prepared, team) for team in range(mesh.pipeline)]
    first = sum(prepared.place.hosts.sizes[: prepared.place.host]) // layout.model_workers
    shares = micro_batches(config.micro_batches, prepared.place.hosts.size // layout.model_workers)
    messages = prepared.passages.sizes if prepared.passages is not None else ()
    result = []
    for rank in range(mesh.size):
        at = mesh.coordinates(rank)
        own = shares[first + at["data"]]
        actions = timetable(layout.schedule, layout.pipeline, own, layout.virtual_stages).workers[at["pipeline"]]
        stages = {action.stage for action in actions}
        received = sum(messages[stage - 1] for stage in stages if stage > 0)
        _, partials = accumulation(own.start, own.stop, config.micro_batches)
        if prepared.stashing is not None:
            partials = accumulation(0, prepared.stashing.unit, prepared.stashing.unit)[1]
        result.append(
            worker_memory(
                states[at["pipeline"]],
                sharers=mesh.data * mesh.tensor // prepared.host.replicas,
                crew=mesh.tensor,
                partials=partials,
                activation_bytes=most_activations(actions, dict(enumerate(each))),
                message_bytes=2 * received * in_flight(actions) // max(1, len(stages)),
            )
        )
    return [_shared(prepared, config, kinds) for kinds in result]


def _shared(prepared: Prepared, config: TrainingConfig, kinds: dict[str, int]) -> dict[str, int]:
    """What a worker takes where hosts share one state."""
    shards = prepared.shards
    if shards is None:
        return kinds
    kinds = {**kinds, "optimizer": kinds["optimizer"] // shards.hosts}
    if shards.rounds:
        partials = accumulation(0, config.micro_batches, config.micro_batches)[1]
        kinds["gradients"] = partials * _state(prepared, 0).gradient_bytes // shards.hosts
    if shards.values:
        kinds["parameters"] //= shards.hosts
    return kinds


def _in_parts(prepared: Prepared, found: Outline) -> Outline:
    """An outline with what a tensor-parallel worker keeps of it."""
    if prepared.tensor is None:
        return found
    kept = {path: findings.kept for path, findings in prepared.tensor.findings.items()}

    def part(unit: Unit) -> Unit:
        factor = next((factor for path, factor in kept.items() if within(unit.path, path)), 1.0)
        return replace(unit, saved_bytes=int(factor * unit.saved_bytes), dear_bytes=int(factor * unit.dear_bytes))

    return replace(found, units=tuple(map(part, found.units)))


def _state(prepared: Prepared, team: int) -> ModelState:
    flat, teams = prepared.layout.flat, prepared.teams
    of_parameter: dict[int, int] = {}
    for own, (_, parameter) in zip(teams.uses, flat.uses, strict=True):
        of_parameter.setdefault(parameter, own)
    parameter_bytes = optimizer_bytes = largest = 0
    for p, spec in enumerate(flat.parameters):
        if of_parameter.get(p, 0) == team:
            size_bytes = spec.tensor.numel * item_size(spec.tensor.dtype)
            parameter_bytes += size_bytes * (1 if prepared.stashing is None else 1 + prepared.stashing.delays[p])
            largest = max(largest, size_bytes)
            optimizer_bytes += _optimizer_bytes(prepared, p) if spec.group is not None else 0
    gradient_bytes = sum(
        flat.parameters[p].tensor.numel * item_size(flat.parameters[p].tensor.dtype)
        for own, (_, p) in zip(teams.uses, flat.uses, strict=True)
        if own == team
    )
    buffer_bytes = sum(spec.numel * item_size(spec.dtype) for spec in prepared.layout.buffers)
    return ModelState(parameter_bytes, gradient_bytes, optimizer_bytes, largest, buffer_bytes)


def _optimizer_bytes(prepared: Prepared, parameter: int) -> int:
    spec, optimizer = prepared.layout.flat.parameters[parameter], prepared.layout.optimizer
    if optimizer.tensors:
        return sum(kept.numel * item_size(kept.dtype) for kept in optimizer.tensors[parameter])
    return spec.tensor.numel * sum(
        item_size(dtype) for _, dtype in optimizer.element_keys(spec.tensor.dtype, spec.replica)
    )
