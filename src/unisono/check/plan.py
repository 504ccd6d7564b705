"""``unisono plan``: what a layout is made of, before any worker starts: stages, waits, memory; a model's profile."""

from dataclasses import dataclass
from typing import Any

import torch

from unisono.config import Config
from unisono.data.feed import Feed
from unisono.errors import ConfigurationError
from unisono.events import readable
from unisono.footprint import chosen_recomputation, edges_of, footprint, memory_bytes
from unisono.plan.assignment import micro_batches
from unisono.plan.hosts import Hosts, Place
from unisono.plan.memory import KINDS
from unisono.plan.outline import Outline
from unisono.plan.schedule import timetable
from unisono.plan.sharding import TensorPlan, as_text
from unisono.plan.timing import timing
from unisono.preparation import Prepared, prepare
from unisono.rehearsing import rehearse
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout as numbers.

    Attributes:
        workers: for each: its replica, its place in the pipeline and among those who divide layers, its bytes by kind.
        stages: for each: the module it begins with, its parameters, and operations of a forward of a micro-batch.
        bubble: the part of the time that the timetable's workers wait, where parts of work are equal.
        micro_batches: in a step.
        recompute: as configured, or as chosen where that is automatic.
        limit_bytes: memory that there is.
        tensor: what tensor-parallel workers divide; None where there is one.
    """

    workers: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    bubble: float
    micro_batches: int
    recompute: str
    limit_bytes: int
    tensor: TensorPlan | None = None

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
            "recompute": self.recompute,
            "limit_bytes": self.limit_bytes,
            "fits": self.total_bytes <= self.limit_bytes,
            "tensor": None
            if self.tensor is None
            else {"source": self.tensor.source, "styles": dict(self.tensor.styles), "whole": dict(self.tensor.left)},
        }

    def as_text(self) -> str:
        """For a reader."""
        lines = [
            f"{self.micro_batches} micro-batches in a step; workers wait {self.bubble:.1%} of the time; recompute "
            f"{self.recompute}"
        ]
        for i, stage in enumerate(self.stages):
            begins = f"from {stage['begins']}" if stage["begins"] else "from the beginning"
            lines.append(
                f"stage {i}: {begins}, {stage['parameters']:,} parameters, {stage['flops'] / 1e9:.2f} GFLOP a forward"
            )
        if self.tensor is not None:
            lines.append(as_text(self.tensor))
        lines.append("worker  " + "".join(f"{kind:>13}" for kind in KINDS))
        for rank, worker in enumerate(self.workers):
            lines.append(f"{rank:>6}  " + "".join(f"{readable(worker['bytes'][kind]):>13}" for kind in KINDS))
        fits = "fits" if self.total_bytes <= self.limit_bytes else "DOES NOT FIT"
        lines.append(f"{readable(self.total_bytes)} in all; {fits} in {readable(self.limit_bytes)}")
        return "\n".join(lines)


def plan(prepared: Prepared, found: Outline, config: Config) -> Plan:
    """What a configuration's layout is made of, on one host."""
    layout, mesh = config.layout, prepared.mesh
    recompute = chosen_recomputation(prepared, found, config)
    workers = []
    for rank, used in enumerate(footprint(prepared, found, config, recompute)):
        at = mesh.coordinates(rank)
        workers.append({"replica": at["data"], "pipeline": at["pipeline"], "tensor": at["tensor"], "bytes": used})
    own = micro_batches(config.micro_batches, mesh.data)[0]
    bubble = timing(timetable(layout.schedule, layout.pipeline, own, layout.virtual_stages)).bubble
    stages = _stages(prepared, found)
    tensor = prepared.tensor.plan if prepared.tensor is not None else None
    return Plan(workers, stages, bubble, config.micro_batches, recompute, memory_bytes(layout), tensor)


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


def _stages(prepared: Prepared, found: Outline) -> list[dict[str, Any]]:
    edges = edges_of(prepared, found)
    sizes = {spec.tensor.name: spec.tensor.numel for spec in prepared.layout.flat.parameters if not spec.is_factor}
    division = prepared.division
    return [
        {
            "begins": division.cuts[i - 1].path if division is not None and i else "",
            "parameters": sum(n for name, n in sizes.items() if division is None or division.stage_of(name) == i),
            "flops": sum(unit.flops for unit in found.units[edges[i] : edges[i + 1]]),
        }
        for i in range(len(edges) - 1)
    ]


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
