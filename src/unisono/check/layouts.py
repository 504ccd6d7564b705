"""Whether a configuration's model can have a layout: found before any worker starts."""

from collections.abc import Mapping

import torch

from unisono.config import Config, Layout
from unisono.data.feed import Feed
from unisono.errors import ConfigurationError
from unisono.parallel.initial import without_values
from unisono.plan.outline import Outline
from unisono.plan.partition import divide
from unisono.preparation import rehearse
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task


def outline_of(config: Config) -> Outline:
    """A rehearsal of the configuration's model, which is built without values."""
    objects = objects_of(make_task(config.task, config.options), config.optimizer)
    with without_values():
        model = objects.model()
    feed = Feed(objects.data, config.seed, "training", objects.collate, torch.device("cpu"))
    return rehearse(model, objects.loss, config, feed)


def refuse_what_does_not_fit(config: Config, layouts: Mapping[str, Layout]) -> None:
    """Rehearse the model, where any layout cuts it.

    Arguments:
        layouts: by what an error begins with, empty for nothing.

    Raises:
        ConfigurationError: for the first layout that the model cannot have.
    """
    cut = {name: layout for name, layout in layouts.items() if layout.stages > 1}
    if not cut:
        return
    found = outline_of(config)
    for name, layout in cut.items():
        try:
            divide(found, layout.stages, layout.cuts)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}" if name else str(error)) from None
