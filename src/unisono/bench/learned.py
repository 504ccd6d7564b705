"""Runs that learn something, under one way of agreeing: digits, a small GPT, and sparse logistic regression."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from unisono.bench.optimizers import accuracy, digits, network
from unisono.config import Layout, ScheduleConfig
from unisono.data.feed import Dataset
from unisono.events import Event, StepFinished
from unisono.tasks.lm import LanguageModel
from unisono.trainer import Trainer

FEATURES, PRESENT, EXAMPLES = 100_000, 20, 20_000
"""Of sparse logistic regression: how many there are, in a sample, and samples to train with."""

SERVER = {"mode": "server"}
DILOCO = {"mode": "diloco", "period": 20, "after": 0.2}
LONG = {**DILOCO, "period": 50}
ALONE, TORCHS = "share nothing", "hogwild, torch's shared memory"
WAYS: dict[str, Mapping[str, Any]] = {
    "every step": {},
    "server, synchronous": {**SERVER, "staleness": 0},
    "server, one is backup": {**SERVER, "backup": 1},
    "server, staleness 8": {**SERVER, "staleness": 8},
    "server, asynchronous": SERVER,
    "server, asynchronous, damped": {**SERVER, "damping": "rate"},
    "local, period 8": {"mode": "local", "period": 8},
    "post-local, period 8": {"mode": "local", "period": 8, "after": 0.2},
    "diloco, period 20": DILOCO,
    "diloco, period 20, int8": {**DILOCO, "compression": "int8"},
    "diloco, period 20, streaming": {**DILOCO, "fragments": 2, "delay": 2},
    "diloco, period 50": LONG,
    "diloco, period 50, int8": {**LONG, "compression": "int8"},
    "diloco, period 50, streaming": {**LONG, "fragments": 2, "delay": 2},
    "pipedream": {"mode": "pipedream"},
    "pipedream, two versions": {"mode": "pipedream_2bw"},
    "hogwild": {"mode": "hogwild"},
    ALONE: {"mode": "hogwild"},
}
"""``after`` is a share of all steps; with the last one, each worker trains a model of its own."""

_LONG = [way for way in WAYS if "period 50" in way]
TASKS: dict[str, tuple[int, Sequence[str]]] = {
    "digits": (4, [way for way in WAYS if way not in (*_LONG, ALONE)]),
    "gpt": (4, [way for way in WAYS if way not in (*_LONG, ALONE)]),
    "sparse": (2, ["every step", "server, asynchronous", "hogwild", TORCHS, ALONE]),
    "gpt-long": (2, ["every step", *_LONG]),
}
"""Workers, and the ways that are compared."""
STAGES = {"digits": 2}
"""Workers of a pipeline, where a model cannot be cut into as many stages."""


def workers_of(task: str, way: str) -> int:
    """How many a way takes."""
    workers = TASKS[task][0]
    return STAGES.get(task, workers) if way.startswith("pipedream") else workers


class SparseSamples:
    """Which features are present, and whether their weights' sum is above 0.

    Features are as frequent as words are: the n-th by 1 / n.
    """

    draws = False

    def __init__(self, first: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(FEATURES, generator=generator)
        frequency = 1 / torch.arange(10.0, FEATURES + 10)
        generator.manual_seed(1 + first)
        drawn = torch.multinomial(frequency, count * PRESENT, replacement=True, generator=generator)
        self._features = drawn.view(count, PRESENT)
        self._labels = (weights[self._features].sum(1) > 0).float()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._features[index], self._labels[index]


class SparseLogistic(nn.Module):
    """A weight a feature, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.EmbeddingBag(FEATURES, 1, mode="sum", sparse=True)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weights.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, features) -> (batch,), a logit."""
        result: Tensor = self.weights(features).squeeze(1) + self.bias
        return result


@dataclass(frozen=True, slots=True)
class Problem:
    """What is learned, by how many samples, and how its figures are told.

    Attributes:
        samples: that a run uses.
        batch: of a step where all workers take part in each; a worker's part of it is one push, or one replica's.
        meetings: of workers that do not wait for each other.
        rate: of a step's batch.
        schedule: of the rate.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Dataset
    validation: Dataset
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer]
    metrics: Callable[[Tensor, Tensor], Mapping[str, float]]
    samples: int
    batch: int
    meetings: int
    rate: float
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


def problem(task: str) -> Problem:
    """A task by name."""
    if task == "digits":
        data, held_out = digits()

        def sgd(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
            return SGD(parameters, lr=rate, momentum=0.9)

        return Problem(network, F.cross_entropy, data, held_out, sgd, accuracy, 64 * 600, 64, 10, 0.1)
    if task == "sparse":

        def plain(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
            return SGD(parameters, lr=rate)

        loss = F.binary_cross_entropy_with_logits
        samples, others = SparseSamples(0, EXAMPLES), SparseSamples(1, 4000)
        return Problem(SparseLogistic, loss, samples, others, plain, _sign_is_right, 5 * EXAMPLES, 80, 5, 4.0)
    text = LanguageModel(layers=2, width=64, heads=4, context=64)

    def adamw(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
        return AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)

    train, validation = text.dataset("train"), Some(text.dataset("validation"), 1600)
    parts = text.model, text.loss, train, validation, adamw, _byte_is_right
    if task == "gpt-long":
        cosine = ScheduleConfig(name="cosine", warmup_steps=100, final=0.1)
        return Problem(*parts, 32 * 3000, 32, 4, 2e-3, cosine)
    return Problem(*parts, 32 * 400, 32, 4, 3e-3)


class Some:
    """Samples of a dataset, evenly among all."""

    draws = False

    def __init__(self, data: Dataset, count: int) -> None:
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> object:
        return self._data[index * (len(self._data) // self._count)]


def _sign_is_right(output: Tensor, target: Tensor) -> dict[str, float]:
    return {"accuracy": float(((output > 0) == (target > 0.5)).float().mean())}


def _byte_is_right(output: Tensor, target: Tensor) -> dict[str, float]:
    return {"accuracy": float((output.argmax(-1) == target).float().mean())}


def measure(task: str, way: str, seed: int) -> dict[str, Any]:
    """One run's figures; speed is the first worker's."""
    torch.set_num_threads(1)
    if way == ALONE:
        for name in [name for name in os.environ if name.startswith("UNISONO_") or name in ("WORLD_SIZE", "RANK")]:
            del os.environ[name]
    given, sync, workers = problem(task), dict(WAYS[way]), TASKS[task][0]
    pushes, piped = sync.get("mode") in ("server", "hogwild"), way.startswith("pipedream")
    if piped:
        sync["push"] = workers  # an update of a whole batch, by as many micro-batches
    unit = given.batch // workers
    batch = given.samples // given.meetings if pushes or piped else given.batch
    steps = given.samples // batch
    if "after" in sync:
        sync["after"] = int(sync["after"] * steps)
    in_turn = pushes and sync.get("staleness") != 0 and "backup" not in sync  # each push is a step of its own
    rate = given.rate / workers if in_turn else given.rate
    ends, late = [], [0]

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            ends.append(time.monotonic())
            late.extend(event.staleness or ())

    trainer = Trainer(
        model=given.model,
        loss=given.loss,
        data=given.data,
        optimizer=lambda parameters: given.optimizer(parameters, rate),
        validation=given.validation,
        metrics=given.metrics,
        validate={"every": steps},
        schedule=given.schedule,
        sync=sync,
        layout=Layout(pipeline=workers_of(task, way) if piped else 1),
        global_batch_size=batch,
        micro_batch_size=unit,
        seed=seed,
        callbacks=[note],
        observe={"progress": False},
    )
    result = trainer.fit(steps)
    assert result.validation is not None and trainer.model is not None
    size_bytes = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    seconds = (ends[-1] - ends[0]) * steps / (steps - 1) if ends else 0.0
    samples = given.samples * (workers if way == ALONE else 1)
    told = told_bytes(sync, size_bytes, steps, given.samples // unit, workers)
    return {
        "accuracy": result.validation["accuracy"],
        "loss": result.validation["loss"],
        "bytes": 0 if way == ALONE else None if task == "sparse" and pushes else told,
        "wall_s": seconds,
        "samples_per_s": samples / seconds if seconds else 0.0,
        "staleness_max": max(late),
    }


def told_bytes(sync: Mapping[str, Any], size_bytes: int, steps: int, pushes: int, workers: int) -> int | None:
    """What workers tell each other in all, by how the way works: gradients or how far they have moved, and values.

    None where it depends on which rows have gradients, or on how large activations are.

    Arguments:
        size_bytes: of the parameters.
        steps: of all workers together.
        pushes: units of work in all.

    >>> told_bytes({}, 100, 10, 40, 4), told_bytes({"mode": "local", "period": 5}, 100, 10, 40, 4)
    (8000, 1600)
    """
    each_step = 2 * workers * size_bytes
    mode: str | None = sync.get("mode")
    if mode is None:
        return steps * each_step
    if mode in ("hogwild", "pipedream", "pipedream_2bw"):
        return None
    if mode == "server":
        accepted = workers - int(sync.get("backup", 0))
        in_rounds = sync.get("staleness") == 0 or "backup" in sync
        pulls = pushes // accepted * workers if in_rounds else pushes
        return (pushes + pulls) * size_bytes
    after, period = int(sync.get("after", 0)), int(sync["period"])
    told = {"int8": 1, "bf16": 2}.get(sync.get("compression", ""), 4) / 4
    return after * each_step + int((steps - after) // period * workers * (1 + told) * size_bytes)
