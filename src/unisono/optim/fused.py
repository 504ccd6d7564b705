"""torch's fused CPU kernels, called directly for one tensor.

A step of torch.optim takes 75 us around the kernel that does the work (grouping by device, one tensor at a time into
lists); an owner updates in pieces that fit the cache, and pays it for each. Bit for bit what the class's own step does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Kernel = Callable[[Mapping[str, Any], Tensor, Tensor, Mapping[str, Tensor]], None]
"""(parameter group, values, gradient, state) -> None; updates values and state in place."""


def kernel(optimizer: Optimizer, group: Mapping[str, Any]) -> Kernel | None:
    """The kernel that updates one tensor of a group, where the class has one and nothing unusual is asked of it."""
    unusual = group.get("capturable") or group.get("differentiable") or not group.get("fused")
    if unusual or isinstance(group.get("lr"), Tensor):
        return None
    if type(optimizer) is torch.optim.AdamW or (
        type(optimizer) is torch.optim.Adam and group["decoupled_weight_decay"]
    ):
        return _adamw
    if type(optimizer) is torch.optim.Adam:
        return _adam
    if type(optimizer) is torch.optim.SGD:
        return _sgd
    return None


def _adam_with(function: Callable[..., None]) -> Kernel:
    def update(group: Mapping[str, Any], values: Tensor, gradient: Tensor, state: Mapping[str, Tensor]) -> None:
        state["step"].add_(1)
        beta1, beta2 = group["betas"]
        function(
            [values],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            amsgrad=group["amsgrad"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    return update


_adam = _adam_with(torch._fused_adam_)
_adamw = _adam_with(torch._fused_adamw_)


def _sgd(group: Mapping[str, Any], values: Tensor, gradient: Tensor, state: Mapping[str, Tensor]) -> None:
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    torch._fused_sgd_(
        [values],
        [gradient],
        [buffer] if buffer is not None else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )
