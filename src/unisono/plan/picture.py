"""A plan as a picture: memory of a device by kind, where a step's time goes, and the timetable of a pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import ConfigurationError
from unisono.plan.cost import REASONS
from unisono.plan.division import Division
from unisono.plan.hardware import GIB
from unisono.plan.planner import Plan
from unisono.plan.schedule import Kind, timetable
from unisono.plan.timing import timing
from unisono.plan.usage import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAWN = 16
"""Micro-batches and stages of a timeline: of more, the first."""
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {Kind.FORWARD: "#4878d0", Kind.BACKWARD: "#ee854a", Kind.INPUT: "#ee854a", Kind.WEIGHT: "#d5bb67"}


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan into a file.

    Raises:
        ConfigurationError: where the file's format is not known, or it cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"a picture in {path}: give a name that ends with {', '.join(FORMATS)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
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
    _timeline(grid["timeline"], plan.best[0].division, plan.best[0].step_s)
    cluster, model = plan.question.cluster, plan.question.model
    figure.suptitle(f"{model.name} on {cluster}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; choose another") from error


def _timeline(axis: "Axes", division: Division, step_s: float) -> None:
    """The timetable of the first division, scaled to its step."""
    stages = min(division.pipeline, MOST_DRAWN)
    count = min(division.micro_batches, MOST_DRAWN)
    virtual = division.virtual if division.schedule == "interleaved" else 1
    table = timetable(division.schedule, stages, range(count), virtual)
    timed = timing(table)
    scale = step_s / timed.total
    for worker, (actions, spans) in enumerate(zip(table.workers, timed.spans, strict=True)):
        computing = [action for action in actions if action.kind.computes]
        for action, (begin, end) in zip(computing, spans, strict=True):
            bar = [(begin * scale, (end - begin) * scale)]
            axis.broken_barh(
                bar, (worker - 0.4, 0.8), facecolors=COLOURS[action.kind], edgecolor="white", linewidth=0.5
            )
    axis.set_yticks(range(stages))
    axis.invert_yaxis()
    shown = (
        ""
        if (stages, count) == (division.pipeline, division.micro_batches)
        else (f" (the first {stages} of {division.pipeline} stages, {count} of {division.micro_batches} micro-batches)")
    )
    axis.set(
        title=f"a step's timetable, {division.schedule}{shown}",
        xlabel="s, as if that were a whole step",
        ylabel="stage",
    )
