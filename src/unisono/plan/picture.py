"""A plan as a picture: memory of a device by kind, where a step's time goes, and the timetable of a pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import ConfigurationError
from unisono.plan.cost import REASONS
from unisono.plan.hardware import GIB
from unisono.plan.planner import Plan
from unisono.plan.schedule import Kind
from unisono.plan.simulator import Step, simulate
from unisono.plan.staging import wires_of, work_of
from unisono.plan.usage import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 32
"""Micro-batches of a timeline: of more, the first."""
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {Kind.FORWARD: "#4878d0", Kind.BACKWARD: "#ee854a", Kind.INPUT: "#ee854a", Kind.WEIGHT: "#d5bb67"}


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan into a file.

    Raises:
        ConfigurationError: where the file's format is not known, or it cannot be written.
    """
    figure = _figure(path, (12, 9))
    grid = figure.subplot_mosaic([["memory", "time"], ["timeline", "timeline"]], height_ratios=[1, 1.1])
    names = [f"{number}" for number in range(1, len(plan.best) + 1)]
    for axis, keys, title, unit in (
        (grid["memory"], KINDS, "memory of the fullest device, by division", "GiB"),
        (grid["time"], REASONS, "where a step's time goes, by division", "s"),
    ):
        floor = [0.0] * len(plan.best)
        for key in keys:
            values = [one.needed[key] / GIB if unit == "GiB" else one.seconds[key] for one in plan.best]
            if max(values) > 0.005 * max(one.needed_bytes / GIB if unit == "GiB" else one.step_s for one in plan.best):
                axis.bar(names, values, bottom=floor, label=key)
            floor = [a + b for a, b in zip(floor, values, strict=True)]
        axis.set(title=title, ylabel=unit)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    room = plan.question.cluster.device.memory_bytes / GIB
    grid["memory"].axhline(room, linestyle="--", color="black", linewidth=1)
    _first(grid["timeline"], plan)
    cluster, model = plan.question.cluster, plan.question.model
    figure.suptitle(f"{model.name} on {cluster}")
    _save(figure, path)


def _first(axis: "Axes", plan: Plan) -> None:
    """The first division's timetable, as it is simulated: of many micro-batches, the first."""
    question, division = plan.question, plan.best[0].division
    shown = replace(division, micro_batches=min(division.micro_batches, MOST_DRAWN))
    work = work_of(question.model, question.tokens, shown, question.cluster, question.known)
    step = simulate(work, wires_of(question.cluster, question.known))
    of = f" of {division.micro_batches}" if shown != division else ""
    timeline(axis, step, f"timetable of a replica, {division.schedule}, {shown.micro_batches}{of} micro-batches")


def timeline(axis: "Axes", step: Step, title: str) -> None:
    """Actions of the first replica's workers."""
    first = min(step.counts)
    own = [span for span in step.spans if span.replica == first]
    for kind, colour in COLOURS.items():
        for worker in sorted({span.worker for span in own}):
            bars = [(s.begin, s.end - s.begin) for s in own if (s.worker, s.action.kind) == (worker, kind)]
            axis.broken_barh(bars, (worker - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.4)
    axis.set_yticks(sorted({span.worker for span in own})[:: max(1, len({s.worker for s in own}) // 16)])
    axis.invert_yaxis()
    axis.set(title=title, xlabel="s", ylabel="stage")


def draw_step(step: Step, title: str, path: Path) -> None:
    """Draw a simulated step into a file.

    Raises:
        ConfigurationError: where the file's format is not known, or it cannot be written.
    """
    figure = _figure(path, (12, 5))
    timeline(figure.subplots(), step, title)
    _save(figure, path)


def _figure(path: Path, size: tuple[float, float]) -> "Figure":
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"a picture in {path}: give a name that ends with {', '.join(FORMATS)}")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; choose another") from error
