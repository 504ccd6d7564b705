"""``unisono bench plan``: what is predicted of layouts here, beside what they take; and whether the best was chosen."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from unisono.bench.variants import PeakMemory
from unisono.check import choosing, sounding
from unisono.check.choosing import Prospect
from unisono.config import Config, Layout, validate
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

_GPT = {"task": "lm", "optimizer": {"name": "AdamW", "lr": 1e-3}, "steps": 100}
CASES: Mapping[str, dict[str, Any]] = {
    "gpt": {
        **_GPT,
        "options": {"layers": 4, "width": 128, "heads": 4, "context": 128, "dropout": 0.1},
        "global_batch_size": 32,
        "micro_batch_size": 8,
    },
    "wide": {
        **_GPT,
        "options": {"layers": 4, "width": 512, "heads": 8, "context": 128, "dropout": 0.0},
        "global_batch_size": 8,
        "micro_batch_size": 8,
    },
    "three": {
        **_GPT,
        "options": {"layers": 6, "width": 256, "heads": 4, "context": 128, "dropout": 0.0},
        "global_batch_size": 24,
        "micro_batch_size": 8,
    },
    "digits": {
        "task": "images",
        "options": {"width": 64, "dropout": 0.2},
        "optimizer": {"name": "SGD", "lr": 0.05, "options": {"momentum": 0.9}},
        "steps": 100,
        "global_batch_size": 448,
        "micro_batch_size": 64,
    },
    "large": {
        **_GPT,
        "options": {"layers": 8, "width": 512, "heads": 8, "context": 128, "dropout": 0.0},
        "global_batch_size": 16,
        "micro_batch_size": 4,
    },
}
"""Models: several micro-batches; one; three for two workers; seven; and one that is far larger than a process."""
BESIDE = (
    Layout(data=1, recompute="full"),
    Layout(data=2, recompute="full"),
    Layout(data=1, pipeline=2, schedule="gpipe"),
    Layout(data=1, pipeline=2, recompute="full"),
    Layout(data=2, zero=0),
)
"""Layouts that nobody would choose here, and that are predicted all the same."""
STEPS = 8


def peak(config: Mapping[str, Any], count: int) -> int:
    """Bytes of this worker at the most as it trains some steps; shared pages count by share."""
    with PeakMemory(on=True) as most:
        sounding.steps(config, count)
    return most.peak_bytes


def bench(
    launcher: Launcher, names: Sequence[str], rounds: int, workers: int, say: Callable[[str], None] | None
) -> dict[str, Any]:
    """Predict, then measure, rounds interleaved; a row for each layout of each model, and for each model its choice."""
    rows, choices = [], []
    for name in names:
        config = validate(Config, CASES[name], name)
        found = _prospects(launcher, config, workers)
        seconds: dict[int, list[float]] = {i: [] for i in range(len(found))}
        for _ in range(rounds):
            for i, one in enumerate(found):
                seconds[i].append(_run(launcher, config, one, "unisono.check.sounding:steps")[0]["step"])
        own = []
        for i, one in enumerate(found):
            found_bytes = sum(_run(launcher, config, one, "unisono.bench.prospects:peak"))
            measured = median(seconds[i])
            own.append(
                {
                    "model": name,
                    **one.as_dict(),
                    "measured_s": measured,
                    "time_ratio": round(one.step_s / measured, 3),
                    "measured_bytes": found_bytes,
                    "memory_ratio": round(one.memory_bytes / found_bytes, 3),
                }
            )
            if say is not None:
                say(as_text(own[-1]))
        chosen = next(row for row in own if row["fits"])
        best = min(own, key=lambda row: row["measured_s"])
        choices.append(
            {
                "model": name,
                "chosen": chosen["layout"],
                "best": best["layout"],
                "throughput_of_best": round(best["measured_s"] / chosen["measured_s"], 3),
            }
        )
        if say is not None:
            say(choice_as_text(choices[-1]))
        rows += own
    return {"rows": rows, "choices": choices}


def _prospects(launcher: Launcher, config: Config, workers: int) -> list[Prospect]:
    """Of all layouts, the one that would be chosen first."""
    possible = [layout for layout in choosing.candidates(config, workers) if choosing.is_possible(config, layout)]
    beside = [one for one in BESIDE if one.data <= config.micro_batches and choosing.is_possible(config, one)]  # type: ignore[operator]
    known = choosing.sound(launcher, config, [*possible, *beside])
    found = sorted((choosing.prospect(config, layout, known) for layout in possible), key=lambda one: one.step_s)
    return [*found, *(choosing.prospect(config, layout, known) for layout in beside)]


def _run(launcher: Launcher, config: Config, one: Prospect, call: str) -> list[Any]:
    arguments = {"config": choosing.bare(config, one.layout), "count": STEPS}
    results = launcher.run({"call": call, "arguments": arguments}, one.workers, output=STANDARD_ERROR).results
    return list(results)


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    words = " ".join(f"{key}={value}" for key, value in row["layout"].items())
    return (
        f"{row['model']:<7} {words:<45} {1000 * row['measured_s']:8.1f} ms, predicted {row['time_ratio']:.2f} of it; "
        f"{row['measured_bytes'] / 2**20:7.0f} MiB, predicted {row['memory_ratio']:.2f}"
    )


def choice_as_text(choice: dict[str, Any]) -> str:
    """A model's choice for a reader."""
    words = " ".join(f"{key}={value}" for key, value in choice["chosen"].items())
    return f"{choice['model']:<7} chosen: {words}, {choice['throughput_of_best']:.2f} of the best layout's throughput"
