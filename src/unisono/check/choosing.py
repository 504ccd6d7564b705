"""What a step takes in each layout on this machine, predicted from a few measured ones; and the layout to choose.

Measured are micro-batches: one worker's, unit by unit, and those of workers who divide layers or compute layers again.
The rest follows: which worker has how many, stages from their units, waits from the timetable, cores that are shared.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from unisono.check.plan import plan, prepared_without_values
from unisono.config import Config, Layout
from unisono.errors import ConfigurationError
from unisono.events import readable
from unisono.footprint import memory_bytes
from unisono.launch.launcher import Launcher
from unisono.launch.runs import cores
from unisono.launch.task import STANDARD_ERROR
from unisono.plan.assignment import micro_batches
from unisono.plan.outline import Outline
from unisono.plan.schedule import Kind, timetable, virtual
from unisono.plan.simulator import Wires, Work, simulate
from unisono.plan.space import divisors
from unisono.preparation import Prepared

SHOWN = 8
"""Layouts that a reader sees."""
TRIED = 6
"""Steps of each measurement."""
MESSAGE_BYTES_PER_S = 4e9
"""Of a store into shared memory and a load from it."""
SCHEDULES = ("1f1b", "zb_h1", "interleaved", "zb_v")


@dataclass(frozen=True, slots=True)
class Sounding:
    """What was measured of a configuration here.

    Attributes:
        outline: of its model.
        forward, backward: seconds of a micro-batch, unit by unit.
        compute_s: of a micro-batch as the engine computes it, by (tensor, recompute).
        data_s: of loading one.
        rest_s: of a step beside its micro-batches, by the way that workers work ("alone", or as in ``dearer``).
        dearer: how much longer workers take than one alone does for the same, by the way that they work: together on
            this machine's cores, as stages, and as stages whose backwards come in two parts.
    """

    outline: Outline
    forward: list[float]
    backward: list[float]
    compute_s: dict[tuple[int, str], float]
    data_s: float
    rest_s: dict[str, float]
    dearer: dict[str, float]


@dataclass(frozen=True, slots=True)
class Prospect:
    """A layout with what is predicted of it.

    Attributes:
        workers: that it needs.
        step_s: of a step; infinite where it does not fit.
        memory_bytes: of all workers.
        fits: that in what this machine's workers may take.
    """

    layout: Layout
    workers: int
    step_s: float
    memory_bytes: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "layout": self.layout.model_dump(exclude_defaults=True),
            "workers": self.workers,
            "step_s": self.step_s,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
        }

    def as_text(self) -> str:
        """For a reader."""
        words = " ".join(f"{key}={value}" for key, value in self.layout.model_dump(exclude_defaults=True).items())
        fits = "" if self.fits else ", DOES NOT FIT"
        return f"{1000 * self.step_s:9.1f} ms  {readable(self.memory_bytes):>10}{fits}  {self.workers} workers  {words}"


def bare(config: Config, layout: Layout) -> dict[str, Any]:
    """A configuration for a few steps of a layout: as it is, without records and validation, as data."""
    data = config.model_dump(mode="json")
    data |= {"layout": layout.model_dump(mode="json"), "run_dir": None}
    data["validation"] = {**data["validation"], "every": None}
    data["checkpoint"] = {**data["checkpoint"], "every": None}
    data["observe"] = {**data["observe"], "progress": False}
    return data


def sound(launcher: Launcher, config: Config, layouts: Iterable[Layout]) -> Sounding:
    """Measure what the layouts' micro-batches take, each way of computing one once: a few seconds."""
    single, wanted = Layout(data=1), list(layouts)
    _, found = prepared_without_values(config.model_copy(update={"layout": single}), 1)
    base, first = bare(config, single), _steps(launcher, config, single, 1)
    unit = _measured(launcher, "units", {"config": base}, 1)
    compute = {(1, "none"): first["compute"] / config.micro_batches}
    for layout in wanted:
        key = (layout.tensor, layout.recompute)
        if key not in compute:
            alone = layout.model_copy(update={"data": 1, "pipeline": 1, "schedule": "1f1b", "virtual_stages": 1})
            compute[key] = _steps(launcher, config, alone, layout.tensor)["compute"] / config.micro_batches
    data_s = first["data"] / config.micro_batches
    rest = max(0.0, first["step"] - first["compute"] - first["data"])
    known = Sounding(found, unit["forward"], unit["backward"], compute, data_s, {ALONE: rest}, {})
    examples = {way: layout for layout in reversed(wanted) if (way := way_of(layout)) != ALONE}
    for way, layout in examples.items():
        like = layout.model_copy(
            update={"recompute": "none", "tensor": 1, "data": 1 if layout.pipeline > 1 else layout.data}
        )
        workers = (like.data or 1) * like.pipeline
        own = _steps(launcher, config, like, workers)
        known.dearer[way] = max(1.0, own["compute"] / _busiest(config, like, known))
        known.rest_s[way] = 0.0
        known.rest_s[way] = max(0.0, own["step"] - prospect(config, like, known).step_s)
    return known


ALONE = "alone"


def way_of(layout: Layout) -> str:
    """How a layout's workers work."""
    if layout.pipeline > 1:
        return "split" if layout.schedule.startswith("zb") else "stages"
    return "together" if (layout.data or 1) > 1 else ALONE


def _busiest(config: Config, layout: Layout, known: Sounding) -> float:
    """Seconds that the worker computes that computes most."""
    prepared, _ = prepared_without_values(
        config.model_copy(update={"layout": layout}), (layout.data or 1) * layout.pipeline
    )
    work = _work(config, layout, known, prepared)
    table = timetable(work.schedule, work.stages, range(work.micro_batches), work.virtual)
    busy = (sum(work.seconds[a.kind, a.stage] for a in own if a.kind.computes) for own in table.workers)
    return max(busy)


def _steps(launcher: Launcher, config: Config, layout: Layout, workers: int) -> dict[str, float]:
    return dict(_measured(launcher, "steps", {"config": bare(config, layout), "count": TRIED}, workers))


def _measured(launcher: Launcher, what: str, arguments: dict[str, Any], workers: int) -> Any:
    """What the first worker found; a measurement that is interrupted ends the command."""
    target = {"call": f"unisono.check.sounding:{what}", "arguments": arguments}
    ending = launcher.run(target, workers, output=STANDARD_ERROR)
    if ending.interrupted or ending.preempted:
        raise KeyboardInterrupt
    return ending.results[0]


def prospect(config: Config, layout: Layout, known: Sounding, workers: int | None = None) -> Prospect:
    """What is predicted of a layout.

    Raises:
        ConfigurationError: where the model cannot have it.
    """
    count = workers or (layout.data or 1) * layout.model_workers
    settled = config.model_copy(update={"layout": layout})
    prepared, found = prepared_without_values(settled, count)
    made = plan(prepared, found, settled)
    work = _work(config, layout, known, prepared)
    wires = Wires(count, MESSAGE_BYTES_PER_S, 1.0, cores=most_workers(config))
    computed = simulate(work, wires).computed_s
    step = computed + work.micro_batches * known.data_s + known.rest_s.get(way_of(layout), 0.0)
    limit = memory_bytes(layout)
    return Prospect(layout, count, step, made.total_bytes, made.total_bytes <= limit)


def _work(config: Config, layout: Layout, known: Sounding, prepared: Prepared) -> Work:
    """A replica's step: stages from the units that were measured, scaled to what the engine takes for them."""
    edges = prepared.division.edges if prepared.division is not None else (0, len(known.outline.units))
    spans = [range(a, b) for a, b in pairwise(edges)]
    replicas = prepared.mesh.data
    most = max(len(own) for own in micro_batches(config.micro_batches, replicas))
    whole = sum(known.forward) + sum(known.backward)
    took = known.compute_s[layout.tensor, layout.recompute]
    once = min(took, known.compute_s.get((layout.tensor, "none"), took))
    dearer = known.dearer.get(way_of(layout), 1.0)
    scale, again = dearer * once / whole, dearer * (took - once)  # again: what recomputation takes of a micro-batch
    seconds: dict[tuple[Kind, int], float] = {}
    for stage, span in enumerate(spans):
        forward = scale * sum(known.forward[i] for i in span)
        backward = scale * sum(known.backward[i] for i in span)
        backward += again * forward / (scale * sum(known.forward))
        seconds[Kind.FORWARD, stage], seconds[Kind.BACKWARD, stage] = forward, backward
        seconds[Kind.INPUT, stage] = seconds[Kind.WEIGHT, stage] = backward / 2
    sizes = [known.outline.units[span.start].moved_bytes for span in spans[1:]]
    return Work(
        layout.schedule,
        virtual(layout.schedule, layout.virtual_stages) if layout.schedule == "interleaved" else 1,
        layout.tensor,
        layout.pipeline,
        replicas,
        most,
        seconds,
        max(sizes, default=0),
        (0.0,) * layout.pipeline,
        0.0,
    )


def candidates(config: Config, most: int) -> list[Layout]:
    """Layouts that so many workers can have, or fewer; recomputation comes in where none fits without."""
    found = []
    for count in numbers_of_workers(most):
        for tensor in divisors(count):
            for pipeline in divisors(count // tensor):
                data = count // tensor // pipeline
                if data > config.micro_batches:
                    continue
                for schedule in SCHEDULES if pipeline > 1 else ("1f1b",):
                    parts = {"data": data, "tensor": tensor, "pipeline": pipeline, "schedule": schedule}
                    found.append(config.layout.model_copy(update={"auto": False, **parts}))
    return found


def numbers_of_workers(most: int) -> list[int]:
    """Numbers of workers: all up to four, then powers of two, and the most."""
    return sorted({n for n in range(1, most + 1) if n <= 4 or n & (n - 1) == 0 or n == most})


def choose(
    launcher: Launcher,
    config: Config,
    most: int,
    say: Callable[[str], None] | None = None,
    tensor: int | None = None,
) -> tuple[Prospect, list[Prospect]]:
    """The fastest layout that fits this machine, and all that can be, the fastest first.

    Arguments:
        tensor: workers that divide each layer; None: any number.

    Raises:
        ConfigurationError: where none fits, or what is to be trained cannot be measured so.
    """
    refuse_what_is_not_measured(config)
    possible = [layout for layout in candidates(config, most) if tensor in (None, layout.tensor)]
    possible = [layout for layout in possible if is_possible(config, layout)]
    if not possible:
        raise ConfigurationError(
            f"no layout of {most} workers divides layers by {tensor}, as the run did; give a layout"
        )
    for recompute in ("none", "selective", "full"):
        tried = [layout.model_copy(update={"recompute": recompute}) for layout in possible]
        if say is not None:
            say(f"measuring micro-batches of {len({layout.tensor for layout in tried})} kinds, recompute {recompute}")
        known = sound(launcher, config, tried)
        found = sorted((prospect(config, layout, known) for layout in tried), key=lambda one: one.step_s)
        fitting = [one for one in found if one.fits]
        if fitting:
            return fitting[0], found
    least = min(found, key=lambda one: one.memory_bytes)
    raise ConfigurationError(
        f"no layout of {most} workers fits: the smallest needs {readable(least.memory_bytes)}, and there are "
        f"{readable(memory_bytes(config.layout))}; use a smaller micro_batch_size, or more hosts with layout.zero=3"
    )


def refuse_what_is_not_measured(config: Config) -> None:
    """Check that a configuration's steps can be predicted.

    Raises:
        ConfigurationError: for runs on devices, and runs whose replicas do not agree at each step.
    """
    if config.device != "cpu":
        raise ConfigurationError(f"steps are predicted on processors, and device is {config.device}; give a layout")
    if config.sync.mode != "every_step":
        raise ConfigurationError(
            f"steps are predicted of exact runs, and sync.mode is {config.sync.mode}; give a layout"
        )


def most_workers(config: Config) -> int:
    """As many as there are cores for."""
    return max(1, cores() // config.threads)


def is_possible(config: Config, layout: Layout) -> bool:
    """Whether the model can have it: found without values."""
    try:
        prepared_without_values(config.model_copy(update={"layout": layout}), (layout.data or 1) * layout.model_workers)
    except ConfigurationError:
        return False
    return True


def settled(
    launcher: Launcher,
    config: Config,
    workers: int | None,
    say: Callable[[str], None] | None = None,
    before: Layout | None = None,
) -> Config:
    """A configuration whose layout is chosen here, for as many workers as are given or there are cores for.

    Arguments:
        before: of the run that is resumed: layers are divided among as many workers again, for the same bits.

    Raises:
        ConfigurationError: where a device is asked for, or no layout fits.
    """
    best, found = choose(
        launcher, config, workers or most_workers(config), say, None if before is None else before.tensor
    )
    if say is not None:
        say("\n".join(["layout: auto", *(one.as_text() for one in found[:SHOWN]), ""]))
        if best.layout.tensor > 1:
            say(f"layers are divided: the bits are those of tensor={best.layout.tensor}, whatever else the layout is\n")
    return config.model_copy(update={"layout": best.layout})
