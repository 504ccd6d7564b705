"""What a model's loss on the first micro-batch shows: what it calls, what it costs, which values flow where."""

from collections.abc import Callable

import torch
from torch import nn

from unisono.config import TrainingConfig
from unisono.data.feed import Feed
from unisono.parallel.micro_batch import Loss, call, split
from unisono.parallel.recompute import blocks
from unisono.parallel.tensor_trial import ProvenPlan, proven_plan
from unisono.plan.blocks import FlatLayout
from unisono.plan.flow import flow
from unisono.plan.outline import Outline
from unisono.plan.rehearsal import outline
from unisono.plan.sharding import within


def rehearse(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> Outline:
    """What a rehearsal on the first micro-batch finds of a model."""
    return outline(model, _forward(model, loss, config, feed))


def tensor_parallel_plan(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> ProvenPlan:
    """What tensor-parallel workers divide of a model."""
    found = flow(model, _forward(model, loss, config, feed))
    layout = config.layout
    return proven_plan(
        model,
        found,
        layout.tensor_plan,
        layout.tensor,
        sequence=layout.sequence_parallel,
        head=layout.loss_parallel,
    )


def _forward(model: nn.Module, loss: Loss, config: TrainingConfig, feed: Feed) -> Callable[[], object]:
    """The model's loss on the first micro-batch."""
    inputs, target = split(feed.load(list(range(min(config.micro_batch_size, feed.size))), 0, "rehearsal"))

    def forward() -> object:
        with torch.autocast(feed.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            return loss(call(model, inputs), target)

    return forward


def value_groups(
    model: nn.Module, flat: FlatLayout, loss: Loss, config: TrainingConfig, feed: Feed
) -> tuple[list[str], list[list[str]]]:
    """The layers whose parameters are brought together, the whole model first; the trained parameters of each.

    What is used elsewhere too, or under several names, belongs to the whole model.
    """
    users = flow(model, _forward(model, loss, config, feed), "layout.zero=2", strict=True).parameter_users
    layers = blocks(model)
    members: dict[str, list[str]] = {path: [] for path in ("", *layers)}
    for spec in flat.parameters:
        if spec.group is None:
            continue
        name = spec.tensor.name
        found = [path for path in layers if all(within(user, path) for user in (name, *users.get(name, ())))]
        own = max(found, key=len) if found and len(spec.uses) == 1 else ""
        members[own] += spec.uses
    layers = ["", *(path for path in layers if members[path])]
    return layers, [members[path] for path in layers]
