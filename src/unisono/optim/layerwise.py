"""What LARS and LAMB share: each parameter moves by its own norm, whoever holds which part of the model.

The norms are of whole parameters, so both are of the class "per parameter": its owner has all of it, however the model
and the state are divided.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unisono.plan.assignment import UpdateClass


class Layerwise(Optimizer):
    """An optimizer that updates one parameter after another, each by itself."""

    update_class = UpdateClass.PARAMETER

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update one parameter and its state, and leave its gradient as it is."""


def adapts(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter adapts and decays: biases and scales of norms do not where these are left out."""
    return parameter.dim() > 1 or not group["exclude_vectors"]


def or_one(ratio: Tensor, *norms: Tensor) -> Tensor:
    """The ratio; 1 where any of the norms it was made of is 0, so that a parameter which starts at zero can move.

    >>> or_one(torch.tensor(1.5), torch.tensor(3.0), torch.tensor(2.0))
    tensor(1.5000)
    >>> or_one(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(2.0))
    tensor(1.)
    """
    positive = torch.stack(norms).gt(0).all()
    return torch.where(positive, ratio, torch.ones_like(ratio))


def moving(state: dict[str, Tensor], direction: Tensor, momentum: float, dampening: float = 0.0) -> Tensor:
    """The momentum buffer after a step, which begins as the first direction, as in torch's SGD."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = direction.clone()
    else:
        state["momentum_buffer"].mul_(momentum).add_(direction, alpha=1 - dampening)
    return state["momentum_buffer"]


def refuse_unless(allowed: bool, name: str, value: object, what: str) -> None:
    """Raise ``ValueError``, as torch's optimizers do, for an argument that is not what it must be."""
    if not allowed:
        raise ValueError(f"{name} is {value!r}; it must be {what}")
