"""A model, and what trains with it without being part of it, as one module that lies in memory like any model.

Virtual replicas are copies of a model that train apart: a run has a fixed number of them on any number of workers. What
an optimizer learns of a model's curvature is matrices for some of its layers. What is done for the parameters and
buffers of a model (blocks and owners, commits, checkpoints, recovery) is done for all of them, under names of their
own, ``replica@2.layer.weight`` or ``curvature@layer.inputs``; those of the model stay.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from unisono.plan.blocks import CURVATURE, REPLICA


class Beside(nn.Module):
    """A model with modules beside it.

    Arguments:
        model: what is evaluated, saved and given back when training is over.
        others: by name.
    """

    def __init__(self, model: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self._names = {name: number for number, name in enumerate(others)}
        self.others = nn.ModuleList(others.values())

    @property
    def replicas(self) -> list[str]:
        """The names of virtual replicas."""
        return [name for name in self._names if name.startswith(REPLICA)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(*args, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The model's modules under their names, then the others."""
        memo = set() if memo is None else memo
        yield from self.model.named_modules(memo, prefix, remove_duplicate)
        for name, other in zip(self._names, self.others, strict=True):
            yield from other.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its name in `named_modules`."""
        names = [name for name in self._names if target == name or target.startswith(f"{name}.")]
        if not names:
            return self.model.get_submodule(target)
        name = max(names, key=len)
        return self.others[self._names[name]].get_submodule(target[len(name) + 1 :])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.state_dict(*args, **kwargs)


def with_replicas(model: nn.Module, count: int) -> Beside:
    """A model that virtual replicas of it agree on, and they."""
    return Beside(model, {f"{REPLICA}{number}": copy.deepcopy(model) for number in range(1, count + 1)})


def with_curvature(model: nn.Module, factors: Mapping[str, nn.Module]) -> Beside:
    """A model, and what is learned of the curvature of its layers, by their names."""
    return Beside(model, {f"{CURVATURE}{name}": pair for name, pair in factors.items()})


def own_model(model: nn.Module) -> nn.Module:
    """What a user gave."""
    return model.model if isinstance(model, Beside) else model


def member(model: nn.Module, replica: int) -> nn.Module:
    """What computes a micro-batch: the model itself (0), or one of its virtual replicas."""
    return model.get_submodule(f"{REPLICA}{replica}") if replica else own_model(model)
