"""Which class an optimizer is of: what the update of one element depends on, and thus how it may be divided."""

from typing import Any

import torch
from torch.optim import Optimizer

from unisono.errors import ConfigurationError
from unisono.optim.newton import GIANT
from unisono.plan.assignment import UpdateClass

_ELEMENT: tuple[type[Optimizer], ...] = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
_PARAMETER: tuple[type[Optimizer], ...] = (torch.optim.Adafactor, torch.optim.Muon)
_FUSED_ON_CPU: tuple[type[Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
_FUSED_ON_DEVICES: tuple[type[Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "it evaluates the loss several times in a step through a closure; use SGD or AdamW",
    GIANT: "its directions depend on how many processes have parts of the data; use NewtonCG, or a loop of your own",
    torch.optim.SparseAdam: "it needs sparse gradients, which are summed densely here; use AdamW",
}


def update_class(optimizer: Optimizer) -> UpdateClass:
    """The class of an optimizer: torch's are known; others declare it in an attribute ``update_class``.

    An optimizer that is unknown and declares nothing counts as coupled: one owner updates everything.

    Raises:
        ConfigurationError: for optimizers that cannot work here, with the reason.
    """
    kind = type(optimizer)
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise ConfigurationError(f"optimizer {kind.__name__} cannot be used: {reason}")
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        raise ConfigurationError(
            f"optimizer {kind.__name__} wraps another optimizer, whose parameters would not be the blocks that are "
            "updated here; use the inner optimizer"
        )
    declared = getattr(optimizer, "update_class", None)
    if declared is not None:
        try:
            return UpdateClass(declared)
        except ValueError:
            allowed = ", ".join(repr(c.value) for c in UpdateClass)
            raise ConfigurationError(
                f"optimizer {kind.__name__} declares update_class = {declared!r}; allowed are {allowed}"
            ) from None
    if kind in _ELEMENT:
        return UpdateClass.ELEMENT
    if kind in _PARAMETER:
        return UpdateClass.PARAMETER
    return UpdateClass.COUPLED


def pin_variant(optimizer: Optimizer, device: torch.device) -> None:
    """Choose one implementation for the whole run: fused where the device has it, else the plain loop.

    Variants differ in the last bits, and torch would choose by device and number of tensors.
    """
    fused = _FUSED_ON_CPU if device.type == "cpu" else _FUSED_ON_DEVICES
    for group in optimizer.param_groups:
        # the fused SGD of torch 2.13 gives wrong values for half precision on a CPU
        whole = all(p.dtype in (torch.float32, torch.float64) for p in group["params"])
        fusable = type(optimizer) in fused and whole
        unset = group.get("fused") is None or "foreach" not in group
        if "fused" in group and unset:
            group["fused"] = fusable and not group.get("differentiable", False) and group.get("foreach") is not True
        if "foreach" in group and group["foreach"] is None:
            group["foreach"] = False


def described(optimizer: Optimizer, replicas: int = 0) -> dict[str, Any]:
    """An optimizer's class, its settings and those of its groups, to record with the run.

    Arguments:
        replicas: that train apart, whose groups are those of the model itself.
    """
    groups = [
        {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in group.items()
            if isinstance(v, int | float | str | tuple)
        }
        for group in optimizer.param_groups[: len(optimizer.param_groups) // (1 + replicas)]
    ]
    own = {key: getattr(optimizer, key) for key in getattr(optimizer, "recorded", ())}
    return {"class": type(optimizer).__name__, "groups": groups, **({"settings": own} if own else {})}
