"""What a task is: a model, its data, its loss, its optimizer; and how one is found by name."""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from unisono.data.feed import Dataset
from unisono.errors import ConfigurationError

BUILT_IN = {
    "lm": "unisono.tasks.lm:LanguageModel",
    "images": "unisono.tasks.images:Images",
}


class Task(Protocol):
    """What ``unisono train`` trains.

    Optional besides: ``metrics(output, target)``, ``collate(samples)``, ``definition()`` (facts to record with the
    run), ``summary(model)`` (what to show at the end), ``prediction(output)`` (what ``unisono predict`` keeps),
    ``tokens_per_sample``.
    """

    def model(self) -> nn.Module:
        """Build the model; called under the run's seed."""

    def dataset(self, split: str) -> Dataset | None:
        """The samples of the split "train" or "validation"; None where there is no validation."""

    def loss(self, output: Any, target: Any) -> Any:
        """The mean loss of a micro-batch, or a pair (sum, weight)."""

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer."""


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of a built-in name, or of an import path ``package.module:Class``, made with its options.

    Raises:
        ConfigurationError: where there is none, or it does not take these options, or it lacks a method.
    """
    path = BUILT_IN.get(name, name)
    module_name, separator, class_name = path.partition(":")
    if not separator:
        raise ConfigurationError(
            f"task {name!r} is not known; use {', '.join(BUILT_IN)}, or the import path package.module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(
            f"task {name!r}: cannot import {module_name}: {error}; is it installed, or in this directory?"
        ) from error
    kind = getattr(module, class_name, None)
    if not callable(kind):
        raise ConfigurationError(f"task {name!r}: module {module_name} has no class {class_name}")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ConfigurationError(f"options of task {name!r}: {error}; its options are {known}") from error
    task: Task = kind(**options)
    lacking = [
        method for method in ("model", "dataset", "loss", "optimizer") if not callable(getattr(task, method, None))
    ]
    if lacking:
        raise ConfigurationError(
            f"task {name!r} has no {', '.join(lacking)}; a task has model, dataset, loss, optimizer"
        )
    return task


def no_split(split: str) -> ConfigurationError:
    """For a dataset that a ready-made task does not have."""
    return ConfigurationError(f"there is no split {split!r} of this task's data; it has train and validation")
