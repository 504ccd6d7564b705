"""What a configuration's steps take here, measured in a worker: phases of some steps; a micro-batch, unit by unit."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from unisono.check.layouts import outline_of
from unisono.config import Config, validate
from unisono.data.feed import Feed
from unisono.events import Event, StepFinished
from unisono.parallel.micro_batch import call, split
from unisono.plan.outline import Outline
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task
from unisono.trainer import Trainer

WARM = 2
"""Steps and repetitions that are not counted."""
REPEATED = 4
ENOUGH_S, MOST = 0.5, 500
"""Seconds that steps are to take together, and steps at the most."""


def steps(config: Mapping[str, Any], count: int) -> dict[str, float] | None:
    """Train a few steps, half a second or more, without records; on the first worker, medians: of steps, and of phases.

    Phases are those of the worker that takes longest.

    Arguments:
        config: a `Config`, as data.
    """
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    objects = replace(objects_of(make_task(settings.task, settings.options), settings.optimizer), validation=None)
    seen: list[StepFinished] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            seen.append(event)
            if len(seen) >= count + WARM and sum(one.seconds for one in seen) >= ENOUGH_S:
                trainer.stop()

    trainer = Trainer.from_config(objects, settings, callbacks=[note])
    trainer.fit(MOST)
    own = seen[WARM:]
    if not own:
        return None
    most = {name: [max(phases.get(name, 0.0) for phases in event.phases) for event in own] for name in own[0].phases[0]}
    return {"step": median(event.seconds for event in own), **{name: median(values) for name, values in most.items()}}


def units(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Compute a micro-batch again and again, and look when each unit of the model's outline begins.

    A unit's time goes to the next one's beginning: code between modules is in it. Seconds, forward and backward.
    """
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    objects = objects_of(make_task(settings.task, settings.options), settings.optimizer)
    torch.manual_seed(settings.seed)
    model = objects.model()
    feed = Feed(objects.data, settings.seed, "training", objects.collate, torch.device("cpu"))
    inputs, target = split(feed.load(list(range(min(settings.micro_batch_size, feed.size))), 0, "sounding"))
    watch = _Watch(model, outline_of(settings))
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # inputs of the first unit are no variables
    for _ in range(WARM + REPEATED):
        watch.begin()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
            found = objects.loss(call(model, inputs), target)
        value: Tensor = found if isinstance(found, Tensor) else found[0]
        watch.turn()
        value.backward()  # type: ignore[no-untyped-call]
        watch.end()
        model.zero_grad()
    return watch.times()


class _Watch:
    """When units begin."""

    def __init__(self, model: nn.Module, outline: Outline) -> None:
        self._paths = [unit.path for unit in outline.units]
        modules = dict(model.named_modules())
        self._rounds: list[tuple[list[float], list[float]]] = []
        self._ahead: list[tuple[str, float]] = []
        self._back: list[tuple[str, float]] = []
        self._turned = 0.0
        for path in set(self._paths):
            module = modules[path]
            module.register_forward_pre_hook(lambda _m, _i, path=path: self._ahead.append((path, time.perf_counter())))
            module.register_full_backward_pre_hook(
                lambda _m, _g, path=path: self._back.append((path, time.perf_counter()))
            )

    def begin(self) -> None:
        self._ahead, self._back = [("", time.perf_counter())], []

    def turn(self) -> None:
        self._turned = time.perf_counter()

    def end(self) -> None:
        now = time.perf_counter()
        forward = _spread(self._paths, self._ahead, self._turned)
        back = [("", self._turned), *self._back]
        backward = _spread(self._paths[::-1], back, now)[::-1]
        self._rounds.append((forward, backward))

    def times(self) -> dict[str, list[float]]:
        """Medians."""
        own = self._rounds[WARM:]
        ahead, back = ([median(values) for values in zip(*(r[i] for r in own), strict=True)] for i in (0, 1))
        return {"forward": ahead, "backward": back}


def _spread(paths: list[str], marks: list[tuple[str, float]], end: float) -> list[float]:
    """Seconds of each unit, from the moments at which units, by their paths, began: what is before the first is its."""
    found = [0.0] * len(paths)
    at = 0
    for (path, begin), (_, until) in zip(marks, [*marks[1:], ("", end)], strict=True):
        if path:
            at = next((i for i in range(at, len(paths)) if paths[i] == path), at)
        found[at] += until - begin
    return found
