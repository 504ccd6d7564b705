"""LAMB: Adam whose step is scaled for each parameter to the parameter's own norm."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unisono.optim.layerwise import Layerwise, adapts, or_one, refuse_unless


class LAMB(Layerwise):
    """Layer-wise adaptive moments (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", 2019).

    For a parameter w with gradient g, in step t::

        m = b1 * m + (1 - b1) * g                    without averaging: b1 * m + g
        v = b2 * v + (1 - b2) * g * g
        d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w
        w = w - lr * r * d,  r = |w| / |d|           1 where either norm is 0

    It does not clip: clipping by the global norm is the run's (``clip``), or ``torch.nn.utils.clip_grad_norm_`` in a
    loop of your own, and happens once.

    Arguments:
        params: parameters, or groups of them; every argument below may be a group's own.
        bias_correction: divide the moments by 1 - b^t.
        averaging: the first moment is an average of gradients; else a sum, as momentum SGD has.
        clamp: the ratio is at most 1.
        exclude_vectors: parameters with one dimension or none (biases, scales of norms) neither adapt nor decay: plain
            Adam.

    Raises:
        ValueError: for an argument outside its range.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
    >>> weight.grad = torch.tensor([[0.0, 1.0]])
    >>> optimizer.step()  # Adam's step is (0, 1), its norm is made 5
    >>> [round(value, 4) for value in weight.tolist()[0]]
    [3.0, 3.5]
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        averaging: bool = True,
        clamp: bool = False,
        exclude_vectors: bool = True,
    ) -> None:
        refuse_unless(lr >= 0, "lr", lr, "at least 0")
        refuse_unless(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "two of at least 0, below 1")
        refuse_unless(eps >= 0, "eps", eps, "at least 0")
        refuse_unless(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")
        moments = {"betas": tuple(betas), "eps": eps, "bias_correction": bias_correction, "averaging": averaging}
        trust = {"weight_decay": weight_decay, "clamp": clamp, "exclude_vectors": exclude_vectors}
        super().__init__(params, {"lr": lr, **moments, **trust})

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        direction = _adam(state, gradient, group)
        if adapts(parameter, group):
            direction.add_(parameter, alpha=group["weight_decay"])
            size, change = parameter.norm(), direction.norm()
            ratio = or_one(size / change, size, change)
            direction.mul_(ratio.clamp_(max=1.0) if group["clamp"] else ratio)
        parameter.add_(direction, alpha=-group["lr"])


def _adam(state: dict[str, Tensor], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's direction, in memory of its own; the moments go on."""
    first, second = group["betas"]
    state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first if group["averaging"] else 1.0)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    of_first = of_second = 1.0
    if group["bias_correction"]:
        taken = int(state["step"].item())
        of_first, of_second = 1 - first**taken, 1 - second**taken
    spread = state["exp_avg_sq"].sqrt().div_(of_second**0.5).add_(group["eps"])
    return (state["exp_avg"] / of_first).div_(spread)
