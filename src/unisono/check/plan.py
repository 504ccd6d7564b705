"""``unisono plan``: what a layout is made of, before any worker starts: stages, waits, memory; a model's profile."""

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from unisono.comm.partial import item_size
from unisono.config import Config
from unisono.data.feed import Feed
from unisono.engine import work_share
from unisono.errors import ConfigurationError
from unisono.events import readable
from unisono.parallel.recompute import blocks
from unisono.plan.assignment import micro_batches
from unisono.plan.hosts import Hosts, Place
from unisono.plan.memory import KINDS, ModelState, activations, most_activations, worker_memory
from unisono.plan.outline import Outline
from unisono.plan.schedule import in_flight, timetable
from unisono.plan.timing import timing
from unisono.preparation import Prepared, prepare, rehearse
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout as numbers.

    Attributes:
        workers: for each: its replica, its place in the pipeline, its modules, and its bytes by kind.
        stages: for each: the module it begins with, its parameters, and operations of a forward of a micro-batch.
        bubble: the part of the time that the timetable's workers wait, where parts of work are equal.
        micro_batches: in a step.
        machine_bytes: memory of this machine.
    """

    workers: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    bubble: float
    micro_batches: int
    machine_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all workers, on one host."""
        return sum(sum(worker["bytes"].values()) for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "stages": self.stages,
            "bubble": round(self.bubble, 4),
            "micro_batches": self.micro_batches,
            "workers": self.workers,
            "total_bytes": self.total_bytes,
            "machine_bytes": self.machine_bytes,
            "fits": self.total_bytes <= self.machine_bytes,
        }

    def as_text(self) -> str:
        """For a reader."""
        lines = [f"{self.micro_batches} micro-batches in a step; workers wait {self.bubble:.1%} of the time"]
        for i, stage in enumerate(self.stages):
            begins = f"from {stage['begins']}" if stage["begins"] else "from the beginning"
            lines.append(
                f"stage {i}: {begins}, {stage['parameters']:,} parameters, {stage['flops'] / 1e9:.2f} GFLOP a forward"
            )
        lines.append("worker  " + "".join(f"{kind:>13}" for kind in KINDS))
        for rank, worker in enumerate(self.workers):
            lines.append(f"{rank:>6}  " + "".join(f"{readable(worker['bytes'][kind]):>13}" for kind in KINDS))
        fits = "fits" if self.total_bytes <= self.machine_bytes else "DOES NOT FIT"
        lines.append(f"{readable(self.total_bytes)} in all; {fits} in {readable(self.machine_bytes)} of this machine")
        return "\n".join(lines)


def plan(prepared: Prepared, found: Outline, config: Config) -> Plan:
    """What a configuration's layout is made of, on one host."""
    layout, mesh = config.layout, prepared.mesh
    edges = prepared.division.edges if prepared.division is not None else (0, len(found.units))
    again = blocks(prepared.model, prepared.division)
    each = [activations(found, range(a, b), layout.recompute, again) for a, b in pairwise(edges)]
    states = [_state(prepared, team) for team in range(mesh.pipeline)]
    sharers = mesh.data // prepared.host.replicas
    shares = micro_batches(config.micro_batches, mesh.data)
    workers = []
    for rank in range(mesh.size):
        at = mesh.coordinates(rank)
        own = shares[at["data"]]
        table = timetable(layout.schedule, layout.pipeline, own, layout.virtual_stages)
        actions = table.workers[at["pipeline"]]
        kept = dict(enumerate(each))
        message = prepared.passages.sizes if prepared.passages is not None else ()
        stages = sorted({action.stage for action in actions})
        received = sum(message[stage - 1] for stage in stages if stage > 0)
        workers.append(
            {
                "replica": at["data"],
                "pipeline": at["pipeline"],
                "stages": stages,
                "bytes": worker_memory(
                    states[at["pipeline"]],
                    sharers=sharers,
                    partials=work_share(own, config.micro_batches).buffers,
                    activation_bytes=most_activations(actions, kept),
                    message_bytes=2 * received * in_flight(actions) // max(1, len(stages)),
                    clips=config.clip is not None,
                ),
            }
        )
    first = timetable(layout.schedule, layout.pipeline, shares[0], layout.virtual_stages)
    return Plan(workers, _stages(prepared, found, edges), timing(first).bubble, config.micro_batches, _machine_bytes())


def prepared_without_values(config: Config, workers: int) -> tuple[Prepared, Outline]:
    """A configuration's model and optimizer on one host, with a rehearsal; values are not made where that can be."""
    objects = objects_of(make_task(config.task, config.options), config.optimizer)
    feed = Feed(objects.data, config.seed, "training", objects.collate, torch.device("cpu"))
    place = Place(Hosts((workers,)), 0)
    try:
        prepared = prepare(objects, config.model_copy(update={"init": "by_name"}), place, feed)
    except ConfigurationError:
        prepared = prepare(objects, config, place, feed)
    if prepared.division is not None:
        return prepared, prepared.division.outline
    return prepared, rehearse(prepared.model, objects.loss, config, feed)


def _stages(prepared: Prepared, found: Outline, edges: tuple[int, ...]) -> list[dict[str, Any]]:
    sizes = {spec.tensor.name: spec.tensor.numel for spec in prepared.layout.flat.parameters}
    division = prepared.division
    return [
        {
            "begins": division.cuts[i - 1].path if division is not None and i else "",
            "parameters": sum(n for name, n in sizes.items() if division is None or division.stage_of(name) == i),
            "flops": sum(unit.flops for unit in found.units[edges[i] : edges[i + 1]]),
        }
        for i in range(len(edges) - 1)
    ]


def _state(prepared: Prepared, team: int) -> ModelState:
    flat, teams = prepared.layout.flat, prepared.teams
    of_parameter: dict[int, int] = {}
    for own, (_, parameter) in zip(teams.uses, flat.uses, strict=True):
        of_parameter.setdefault(parameter, own)
    parameter_bytes = optimizer_bytes = largest = 0
    for p, spec in enumerate(flat.parameters):
        if of_parameter.get(p, 0) == team:
            size_bytes = spec.tensor.numel * item_size(spec.tensor.dtype)
            parameter_bytes += size_bytes
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
    return spec.tensor.numel * sum(item_size(dtype) for _, dtype in optimizer.element_keys(spec.tensor.dtype))


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def profile(prepared: Prepared, found: Outline) -> list[dict[str, Any]]:
    """A row for each unit of a model, in the order of their calls."""
    parameters = {spec.tensor.name: spec.tensor.numel for spec in prepared.layout.flat.parameters}
    rows = []
    for i, unit in enumerate(found.units):
        own = sum(size for name, size in parameters.items() if found.homes.get(name) == i)
        rows.append(
            {
                "module": unit.path,
                "parameters": own,
                "flops": unit.flops,
                "activation_bytes": unit.saved_bytes,
                "cut": any(cut.unit == i for cut in found.cuts),
            }
        )
    return rows


def profile_as_text(rows: list[dict[str, Any]]) -> str:
    """For a reader."""
    width = max(len(row["module"]) for row in rows)
    lines = [f"  {'module':<{width}}  {'parameters':>12}  {'MFLOP':>10}  {'activations':>12}"]
    for row in rows:
        lines.append(
            f"{'|' if row['cut'] else ' '} {row['module']:<{width}}  {row['parameters']:>12,}  "
            f"{row['flops'] / 1e6:>10.2f}  {readable(row['activation_bytes']):>12}"
        )
    return "\n".join([*lines, "| a stage can begin here; figures are of one micro-batch's forward"])
