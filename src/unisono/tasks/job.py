"""What every worker of ``unisono train`` does: from a configuration to a trained task."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from unisono import optim
from unisono.config import Config, OptimizerConfig, validate
from unisono.data.feed import Dataset
from unisono.errors import ConfigurationError
from unisono.preparation import Objects
from unisono.tasks.task import Task, make_task
from unisono.trainer import Trainer


def objects_of(task: Task, optimizer: OptimizerConfig | None) -> Objects:
    """A task as what the trainer takes."""
    train = task.dataset("train")
    if train is None:
        raise ConfigurationError('the task has no dataset("train"); return a map-style dataset')
    return Objects(
        model=task.model,
        loss=task.loss,
        data=train,
        optimizer=task.optimizer if optimizer is None else optimizer_factory(optimizer),
        validation=task.dataset("validation"),
        metrics=getattr(task, "metrics", None),
        collate=getattr(task, "collate", None),
        definition=getattr(task, "definition", None),
        summary=getattr(task, "summary", None),
        tokens_per_sample=getattr(task, "tokens_per_sample", None),
    )


def optimizer_factory(config: OptimizerConfig) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """The optimizer that a configuration names.

    Raises:
        ConfigurationError: where neither torch.optim nor unisono.optim has one of that name.
    """
    kinds = {**_optimizers(torch.optim), **_optimizers(optim)}
    if config.name not in kinds:
        lower = {name.lower(): name for name in kinds}
        near = difflib.get_close_matches(config.name.lower(), lower, n=1, cutoff=0.5)
        hint = f"did you mean {lower[near[0]]}? " if near else ""
        raise ConfigurationError(
            f"optimizer.name is {config.name!r}; {hint}unisono.optim has {', '.join(sorted(_optimizers(optim)))}, and "
            f"torch.optim has {', '.join(sorted(_optimizers(torch.optim)))}"
        )
    kind = kinds[config.name]
    rate = {"lr": config.lr} if "lr" in inspect.signature(kind).parameters else {}

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        try:
            return cast(Any, kind)(parameters, **rate, **config.options)  # type: ignore[no-any-return]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"optimizer.options do not fit {config.name}: {error}") from error

    return make


def _optimizers(module: ModuleType) -> dict[str, type[Optimizer]]:
    """The optimizers that a module offers, by name."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: kind for name, kind in found.items() if issubclass(kind, Optimizer) and kind is not Optimizer}


def train(config: Mapping[str, Any], resume: bool = False, evaluate: bool = True) -> dict[str, Any]:
    """Train in this worker; how it ended, as data.

    Arguments:
        config: a `Config`, as data.
        evaluate: use the task's validation split, and its summary.
    """
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    task = make_task(settings.task, settings.options)
    objects = objects_of(task, settings.optimizer)
    if not evaluate:
        objects = replace(objects, validation=None, summary=None)
    trainer = Trainer.from_config(objects, settings)
    result = trainer.fit(settings.steps, resume=resume)
    return asdict(result)


def evaluate(config: Mapping[str, Any], split: str, weights: str) -> dict[str, float]:
    """The figures of a model on a split of its task, from this worker and all others.

    Arguments:
        config: a `Config`, as data.
        weights: a checkpoint.
    """
    trainer, _, data = _looking(config, split)
    return trainer.evaluate(data, weights=weights)


def predict(config: Mapping[str, Any], split: str, weights: str, directory: str) -> dict[str, Any]:
    """Write a model's outputs on a split of its task, from this worker and all others."""
    trainer, task, data = _looking(config, split)
    return asdict(trainer.predict(data, directory, weights=weights, post=getattr(task, "prediction", None)))


def _looking(config: Mapping[str, Any], split: str) -> tuple[Trainer, Task, Dataset]:
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    task = make_task(settings.task, settings.options)
    data = task.dataset(split)
    if data is None:
        raise ConfigurationError(f'task {settings.task} has no dataset("{split}"); give --split of one that it has')
    return Trainer.from_config(objects_of(task, settings.optimizer), settings), task, data
