"""The reduce operations of torch.distributed, as functions of two tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from unisono.comm.meeting import Combine, MeetingError


def _operation(opts: Any) -> Any:
    return opts.reduceOp if hasattr(opts, "reduceOp") else opts if opts is not None else ReduceOp.SUM


def _into(function: Callable[..., Tensor]) -> Combine:
    def combine(a: Tensor, b: Tensor, out: Tensor) -> None:
        function(a, b, out=out)

    return combine


_FUNCTIONS: tuple[tuple[Any, Combine], ...] = (
    (ReduceOp.SUM, _into(torch.add)),
    (ReduceOp.AVG, _into(torch.add)),
    (ReduceOp.PRODUCT, _into(torch.mul)),
    (ReduceOp.MIN, _into(torch.minimum)),
    (ReduceOp.MAX, _into(torch.maximum)),
    (ReduceOp.BAND, _into(torch.bitwise_and)),
    (ReduceOp.BOR, _into(torch.bitwise_or)),
    (ReduceOp.BXOR, _into(torch.bitwise_xor)),
)


def is_sum(opts: Any) -> bool:
    """Whether two tensors are added."""
    return bool(_operation(opts) == ReduceOp.SUM)


def combining(opts: Any) -> Combine:
    """How two tensors are combined."""
    operation = _operation(opts)
    for known, function in _FUNCTIONS:
        if operation == known:
            return function
    raise MeetingError(f"the arena does not know the reduce operation {operation}")


def finish_average(flat: Tensor, opts: Any, size: int) -> None:
    """Make an average of a sum over ``size`` ranks, where that is asked for."""
    if _operation(opts) == ReduceOp.AVG:
        if flat.is_floating_point() or flat.is_complex():
            flat.div_(size)
        else:
            flat.copy_(torch.div(flat, size, rounding_mode="trunc"))
