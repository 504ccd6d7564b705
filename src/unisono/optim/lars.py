"""LARS: momentum SGD whose rate is set for each parameter by the ratio of its norm to that of its gradient."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from unisono.optim.layerwise import Layerwise, adapts, moving, or_one, refuse_unless


class LARS(Layerwise):
    """Layer-wise adaptive rate scaling (You et al., "Large Batch Training of Convolutional Networks", 2017).

    For a parameter w with gradient g, in every step::

        r = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)      1 where |w| or |g| is 0
        d = r * (g + weight_decay * w)
        u = momentum * u + (1 - dampening) * d                              d at the first step
        w = w - lr * u                                                      nesterov: w - lr * (d + momentum * u)

    The rate is outside the momentum, as in torch's SGD: nothing has to be corrected when it changes (see
    docs/optimizers.md). Biases and the scales of norms, which have one dimension, neither adapt nor decay unless
    ``exclude_vectors`` is off.

    Arguments:
        params: parameters, or groups of them; every argument below may be a group's own.
        lr: the global rate, which the ratio multiplies.
        trust_coefficient: how much of its own norm a parameter may change by in a step of rate 1.
        clamp: the ratio is at most 1 / lr, so that no parameter's rate is above 1 (LARC).
        exclude_vectors: parameters with one dimension or none are updated by plain momentum SGD.

    Raises:
        ValueError: for an argument outside its range.

    >>> import torch
    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = LARS([weight], lr=1.0, momentum=0.0, trust_coefficient=0.1, eps=0.0)
    >>> weight.grad = torch.tensor([[0.0, 1.0]])
    >>> optimizer.step()
    >>> weight.tolist()
    [[3.0, 3.5]]
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        clamp: bool = False,
        exclude_vectors: bool = True,
    ) -> None:
        refuse_unless(lr >= 0, "lr", lr, "at least 0")
        refuse_unless(0 <= momentum < 1, "momentum", momentum, "at least 0 and below 1")
        refuse_unless(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")
        refuse_unless(0 <= dampening < 1, "dampening", dampening, "at least 0 and below 1")
        refuse_unless(not nesterov or (momentum > 0 and dampening == 0), "nesterov", nesterov, "off without momentum")
        refuse_unless(trust_coefficient > 0, "trust_coefficient", trust_coefficient, "above 0")
        refuse_unless(eps >= 0, "eps", eps, "at least 0")
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
        trust = {"trust_coefficient": trust_coefficient, "eps": eps, "clamp": clamp}
        super().__init__(params, {**settings, "nesterov": nesterov, **trust, "exclude_vectors": exclude_vectors})

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        direction = gradient
        if adapts(parameter, group):
            ratio = _ratio(parameter, gradient, group)
            direction = gradient.add(parameter, alpha=group["weight_decay"]).mul_(ratio)
        momentum = group["momentum"]
        if momentum:
            buffer = moving(state, direction, momentum, group["dampening"])
            direction = direction.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        parameter.add_(direction, alpha=-group["lr"])


def _ratio(parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    size, slope = parameter.norm(), gradient.norm()
    change = slope + group["weight_decay"] * size + group["eps"]
    ratio = or_one(group["trust_coefficient"] * size / change, size, slope)
    return (ratio / group["lr"]).clamp_(max=1.0) if group["clamp"] else ratio
