"""``unisono bench pipeline``: bubbles beside theory, with layers that sleep; a step beside torch's own pipeline."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from unisono.bench.pipelines import STAGES, TORCHS, described
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR
from unisono.plan.schedule import SCHEDULES, timetable
from unisono.plan.timing import bubble_theory, timing

PART_S = {2: 0.05, 4: 0.05, 8: 0.08}
"""Seconds of a stage's forward; longer where eight workers share the cores for what is not sleep."""
PIPEDREAM, UPDATES = "pipedream", 8
"""Besides: a pipeline that makes so many updates without draining, each of as many micro-batches."""


def bench(
    launcher: Launcher,
    stages: Sequence[int],
    micro_batches: Sequence[int],
    rounds: int,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Measure; a row for each schedule, number of stages and of micro-batches, and a step with real layers."""
    rows = []
    for p in stages:
        for m in micro_batches:
            for schedule in (*SCHEDULES, PIPEDREAM):
                rows.append(_row(launcher, schedule, p, m))
                if say is not None:
                    say(as_text(rows[-1]))
    real = {**described(), "schedules": [_real(launcher, schedule, rounds) for schedule in TORCHS]}
    if say is not None:
        for found in real["schedules"]:
            say(real_as_text(found))
    return {"rows": rows, "real": real}


def _row(launcher: Launcher, schedule: str, stages: int, micro_batches: int) -> dict[str, Any]:
    virtual = 2 if schedule == "interleaved" else 1
    updates = UPDATES if schedule == PIPEDREAM else 1
    order = "1f1b" if schedule == PIPEDREAM else schedule
    arguments = {
        "schedule": order,
        "stages": stages,
        "micro_batches": micro_batches,
        "part_s": PART_S.get(stages, 0.05),
        "virtual_stages": virtual,
        "updates": updates,
    }
    target = {"call": "unisono.bench.sleepers:measure", "arguments": arguments}
    theory = bubble_theory(order, stages, updates * micro_batches, virtual)
    if theory is None:
        theory = timing(timetable(order, stages, range(updates * micro_batches), virtual)).bubble
    return {
        "schedule": schedule,
        "stages": stages,
        "micro_batches": micro_batches,
        "bubble": round(launcher.run(target, stages, output=STANDARD_ERROR).results[0], 4),
        "bubble_theory": round(theory, 4),
    }


def _real(launcher: Launcher, schedule: str, rounds: int) -> dict[str, Any]:
    """Two stages on two cores, rounds interleaved; ``ideal`` is half of one worker's time, and the bubble."""
    seconds: dict[str, list[float]] = {"unisono": [], "torch": [], "one worker": []}

    def run(way: str, workers: int, **arguments: Any) -> list[float]:
        target = {"call": "unisono.bench.pipelines:measure", "arguments": {"way": way, **arguments}}
        return list(launcher.run(target, workers, output=STANDARD_ERROR).results[0])

    for _ in range(rounds):
        seconds["unisono"] += run("unisono", STAGES, schedule=schedule, stages=STAGES)
        seconds["torch"] += run("torch", STAGES, schedule=schedule)
        seconds["one worker"] += run("unisono", 1, schedule="1f1b", stages=1)
    found = {name: median(values) for name, values in seconds.items()}
    bubble = timing(timetable(schedule, STAGES, range(described()["micro_batches"]))).bubble
    ideal = found["one worker"] / STAGES / (1.0 - bubble)
    return {
        "schedule": schedule,
        "seconds": {name: round(value, 4) for name, value in found.items()},
        "ideal_s": round(ideal, 4),
        "throughput_of_ideal": round(ideal / found["unisono"], 3),
        "throughput_of_torch": round(found["torch"] / found["unisono"], 3),
    }


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    return (
        f"{row['schedule']:<12} {row['stages']} stages, {row['micro_batches']:>2} micro-batches: "
        f"bubble {row['bubble']:.3f}, theory {row['bubble_theory']:.3f}"
    )


def real_as_text(found: dict[str, Any]) -> str:
    """A step with real layers, for a reader."""
    return (
        f"{found['schedule']:<12} a GPT in {STAGES} stages: {found['seconds']['unisono']:.3f} s a step, "
        f"{found['throughput_of_ideal']:.2f} of the ideal throughput, {found['throughput_of_torch']:.2f} of torch's"
    )
