"""Virtual replicas: copies of a model that train apart, as one module that lies in memory like any model.

A run has a fixed number of them on any number of workers. What is done for the parameters and buffers of a model
(blocks and owners, commits, checkpoints, recovery) is done for all of them; a micro-batch is computed with one.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from unisono.plan.blocks import REPLICA, split_name


class VirtualReplicas(nn.Module):
    """A model, and replicas of it, with names of their own: ``replica@2.layer.weight``; those of the model stay.

    Arguments:
        model: what replicas agree on; evaluated, saved and given back when training is over.
        count: of replicas.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.replicas = nn.ModuleList(copy.deepcopy(model) for _ in range(count))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(*args, **kwargs)

    def of(self, replica: int) -> nn.Module:
        """The model itself (0), or a replica."""
        return self.replicas[replica - 1] if replica else self.model

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The model's modules under their names, then those of each replica."""
        memo = set() if memo is None else memo
        yield from self.model.named_modules(memo, prefix, remove_duplicate)
        for number, replica in enumerate(self.replicas, start=1):
            name = f"{prefix}.{REPLICA}{number}" if prefix else f"{REPLICA}{number}"
            yield from replica.named_modules(memo, name, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its name in `named_modules`."""
        replica, name = split_name(target)
        return self.of(replica).get_submodule(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.state_dict(*args, **kwargs)


def own_model(model: nn.Module) -> nn.Module:
    """What a user gave: the model that virtual replicas agree on, or the model."""
    return model.model if isinstance(model, VirtualReplicas) else model


def member(model: nn.Module, replica: int) -> nn.Module:
    """What computes a micro-batch: the model itself (0), or one of its virtual replicas."""
    return model.of(replica) if isinstance(model, VirtualReplicas) else model
