"""Whether a configuration's model can have a layout: found before any worker starts."""

from collections.abc import Mapping

import torch
from torch import nn

from unisono.config import Config, Layout
from unisono.data.feed import Feed
from unisono.errors import ConfigurationError
from unisono.parallel.initial import without_values
from unisono.parallel.micro_batch import Loss
from unisono.parallel.tensor_trial import ProvenPlan
from unisono.plan.outline import Outline
from unisono.plan.partition import divide
from unisono.rehearsing import rehearse, tensor_parallel_plan
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task


def outline_of(config: Config) -> Outline:
    """A rehearsal of the configuration's model, which is built without values."""
    model, loss, feed = _bare(config)
    return rehearse(model, loss, config, feed)


def refuse_what_does_not_fit(config: Config, layouts: Mapping[str, Layout]) -> None:
    """Rehearse the model, where any layout cuts it, and try its layers in parts, where any divides them.

    Arguments:
        layouts: by what an error begins with, empty for nothing.

    Raises:
        ConfigurationError: for the first layout that the model cannot have.
    """
    cut = any(layout.stages > 1 for layout in layouts.values())
    found = outline_of(config) if cut else None
    proven: set[tuple[object, ...]] = {()}
    for name, layout in layouts.items():
        try:
            if found is not None and layout.stages > 1:
                divide(found, layout.stages, layout.cuts)
            if layout.rounding not in proven:
                proven.add(layout.rounding)
                _divided(config.model_copy(update={"layout": layout}))
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}" if name else str(error)) from None


def _divided(config: Config) -> ProvenPlan:
    """What the layout's tensor-parallel workers would divide."""
    model, loss, feed = _bare(config)
    return tensor_parallel_plan(model, loss, config, feed)


def _bare(config: Config) -> tuple[nn.Module, Loss, Feed]:
    """The configuration's model, without values, its loss, and its data."""
    objects = objects_of(make_task(config.task, config.options), config.optimizer)
    with without_values():
        model = objects.model()
    return model, objects.loss, Feed(objects.data, config.seed, "training", objects.collate, torch.device("cpu"))
