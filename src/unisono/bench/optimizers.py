"""``unisono bench optimizers``: what large batches cost in accuracy on digits, and what wins it back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset

from unisono.config import ScalingConfig, ScheduleConfig
from unisono.errors import ConfigurationError, TrainingError
from unisono.optim import LAMB, LARS
from unisono.optim.schedules import scale
from unisono.trainer import Trainer

TRAINING, EPOCHS, WARMUP = 1347, 30, 5
"""Samples; the other 450 are held out. Warm-up in epochs."""
CHANCE = 0.1
"""The accuracy of a run that diverged."""

Make = Callable[[Iterable[nn.Parameter], float], Optimizer]
WARM = ScheduleConfig(warmup_steps=WARMUP)
COSINE = ScheduleConfig(name="cosine", warmup_steps=WARMUP)
CONSTANT = ScheduleConfig()
LINEAR = ScalingConfig(rule="linear", base_batch_size=64)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        rates: before scaling; of those that are tried, the one with the best mean accuracy is told.
        all_rates: each of them has a row of its own.
    """

    name: str
    make: Make
    schedule: ScheduleConfig
    rates: tuple[float, ...]
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    all_rates: bool = False


def sgd(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """With momentum."""
    return SGD(parameters, lr=rate, momentum=0.9)


METHODS = (
    Method("SGD, linear scaling", sgd, CONSTANT, (0.025, 0.05, 0.1, 0.2), LINEAR, True),
    Method("SGD, linear scaling, warm-up", sgd, WARM, (0.025, 0.05, 0.1, 0.2), LINEAR, True),
    Method("SGD, tuned", sgd, CONSTANT, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)),
    Method("AdamW, tuned", lambda p, rate: AdamW(p, lr=rate), CONSTANT, (0.003, 0.01, 0.03, 0.1)),
    Method("LARS, tuned", lambda p, rate: LARS(p, lr=rate, exclude_vectors=False), WARM, (10, 15, 20, 25, 30)),
    Method("LAMB, tuned", lambda p, rate: LAMB(p, lr=rate), COSINE, (0.05, 0.1, 0.15, 0.2, 0.3)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a way of training came to.

    Attributes:
        rate: scaled.
        accuracy: mean over seeds, on what is held out, in percent; `CHANCE` counts for a run that diverged.
        steps: of each run.
    """

    method: str
    batch_size: int
    base_rate: float
    rate: float
    steps: int
    accuracy: float
    accuracies: tuple[float, ...]
    diverged: int

    def as_text(self) -> str:
        """A row for a reader."""
        ends = f"{min(self.accuracies):.1f} to {max(self.accuracies):.1f}"
        scaled = f" (scaled: {self.rate:.3g})" if self.rate != self.base_rate else ""
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return (
            f"{self.method:<30} batch {self.batch_size:>4}, rate {self.base_rate:g}{scaled}, {self.steps:>4} steps: "
            f"{self.accuracy:.2f}% ({ends}, {len(self.accuracies)} seeds{lost})"
        )


def bench(seeds: int, pairs: int, say: Callable[[str], None] | None) -> list[dict[str, Any]]:
    """Measure; a row for each method, or for each of its rates.

    Arguments:
        seeds: of each method and rate.
        pairs: of runs at batch 32 and at batch 256, alike but for it.
    """
    training, held_out = digits()
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        if say is not None:
            say(row.as_text())

    for method in METHODS:
        found = [_row(method, rate, TRAINING, range(seeds), training, held_out) for rate in method.rates]
        for row in found if method.all_rates else [max(found, key=lambda row: row.accuracy)]:
            tell(row)
    for batch in (32, 256):
        scaling = ScalingConfig(rule="linear", base_batch_size=32)
        method = Method("SGD, linear scaling", sgd, CONSTANT, (0.05,), scaling)
        tell(_row(method, 0.05, batch, range(pairs), training, held_out))
    return [asdict(row) for row in rows]


def _row(
    method: Method, rate: float, batch: int, seeds: Sequence[int], training: TensorDataset, held_out: TensorDataset
) -> Row:
    steps = EPOCHS * TRAINING // batch
    found = [_accuracy(method, rate, batch, steps, seed, training, held_out) for seed in seeds]
    accuracies = tuple(100 * (CHANCE if value is None else value) for value in found)
    scaled = rate * scale(method.scaling, batch)
    return Row(method.name, batch, rate, scaled, steps, mean(accuracies), accuracies, found.count(None))


def _accuracy(
    method: Method, rate: float, batch: int, steps: int, seed: int, training: TensorDataset, held_out: TensorDataset
) -> float | None:
    """Of one run; None where it diverged."""
    trainer = Trainer(
        model=network,
        loss=F.cross_entropy,
        data=training,
        optimizer=lambda parameters: method.make(parameters, rate),
        validation=held_out,
        metrics=accuracy,
        schedule=method.schedule,
        scaling=method.scaling,
        global_batch_size=batch,
        micro_batch_size=batch,
        seed=seed,
        observe={"progress": False},
    )
    try:
        result = trainer.fit(steps)
    except TrainingError:
        return None
    assert result.validation is not None
    return result.validation["accuracy"]


def network() -> nn.Module:
    """An MLP, 64-128-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(output: Tensor, target: Tensor) -> dict[str, float]:
    """The share of digits that are recognised."""
    return {"accuracy": float((output.argmax(-1) == target).float().mean())}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits, as vectors: 1347 to train with, and 450, classes in proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ConfigurationError("the digits need scikit-learn: pip install 'unisono[examples]'") from error
    found = load_digits()
    parts = train_test_split(found.data / 16, found.target, train_size=TRAINING, random_state=0, stratify=found.target)
    images, others, labels, answers = (torch.from_numpy(part) for part in parts)
    return TensorDataset(images.float(), labels), TensorDataset(others.float(), answers)
